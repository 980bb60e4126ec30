"""Word lists of the miniature tasks, shared with the pre-training text of the built-in base.

The tasks ask about these words and the base reads about them, so the lists stand in one place:
a word that only one side knew would turn a language task into a spelling task.
"""

from __future__ import annotations

from typing import NamedTuple

PEOPLE = (
    "Anna", "Ben", "Carla", "David", "Ella", "Finn", "Gina", "Hugo", "Ida", "Jack",
    "Karl", "Lena", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Tom",
)  # fmt: skip

# --- stance (Chinese) -------------------------------------------------------------------------
STANCE_PEOPLE = ("小明", "小红", "老王", "小李", "老张", "小美")
STANCE_TARGETS = (
    "地铁", "电影", "手机", "学校", "公园", "咖啡", "足球", "音乐", "新车", "游戏", "网课", "外卖",
)  # fmt: skip
STANCE_OPENINGS = ("", "我觉得", "说到底，", "今天", "老实说，", "这里的")
STANCE_CLAUSES = {
    "支持": (
        "我很喜欢", "真的很好", "非常方便", "让人开心", "值得推荐", "质量不错", "大家都满意",
        "我会再来",
    ),
    "反对": (
        "我很讨厌", "真的很差", "非常麻烦", "让人生气", "应该取消", "问题太多", "大家都失望",
        "浪费时间",
    ),
    "中立": (
        "昨天有人问", "在城市北边", "一共有三种", "每天都有", "名字很长", "今年开始",
        "报纸写过", "我不太了解",
    ),
}  # fmt: skip

# --- policy tone ------------------------------------------------------------------------------
POLICY_SPEAKERS = (
    "The chair", "A member", "The staff", "One governor", "The board", "The bank", "A report",
    "The committee",
)  # fmt: skip
POLICY_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
POLICY_CLAUSES = {
    "easy": (
        "inflation is too low", "rates should fall", "jobs are weak", "easier policy is needed",
        "demand is soft", "growth needs support", "credit is too tight", "more stimulus is due",
    ),
    "tight": (
        "inflation is too high", "rates should rise", "prices climb fast",
        "tighter policy is needed", "wages run hot", "demand must slow", "credit is too loose",
        "stimulus must end",
    ),
    "quiet": (
        "the meeting starts at nine", "the minutes are approved", "new charts are ready",
        "the vote was recorded", "the survey is complete", "the tables are printed",
        "the speech was short", "the room was changed",
    ),
}  # fmt: skip

# --- science groups: the last eight of each are kept for the eval and test splits ---------------
SCIENCE_GROUPS = {
    "animal": (
        "whale", "eagle", "frog", "tiger", "horse", "snake", "rabbit", "salmon", "spider", "wolf",
        "camel", "mouse", "goat", "shark", "owl", "bear", "lion", "zebra", "duck", "lizard",
        "monkey", "beetle", "crab", "fox",
    ),
    "plant": (
        "oak", "rose", "fern", "moss", "tulip", "wheat", "pine", "cactus", "daisy", "willow",
        "clover", "bamboo", "maple", "lily", "barley", "ivy", "birch", "palm", "nettle", "poppy",
        "cedar", "reed", "thistle", "elm",
    ),
    "metal": (
        "iron", "copper", "gold", "silver", "zinc", "lead", "nickel", "cobalt", "platinum",
        "titanium", "chrome", "mercury", "steel", "brass", "bronze", "tungsten", "tin",
        "aluminium", "sodium", "lithium", "uranium", "calcium", "magnesium", "pewter",
    ),
}  # fmt: skip
SCIENCE_HELD_OUT = 8

# --- counting parts ---------------------------------------------------------------------------


class Part(NamedTuple):
    """A thing with a fixed number of parts, for the multiplication task."""

    one: str
    many: str
    part: str
    number: int


PARTS = (
    Part("ant", "ants", "legs", 6),
    Part("bee", "bees", "legs", 6),
    Part("dog", "dogs", "legs", 4),
    Part("cow", "cows", "legs", 4),
    Part("hen", "hens", "legs", 2),
    Part("spider", "spiders", "legs", 8),
    Part("bike", "bikes", "wheels", 2),
    Part("car", "cars", "wheels", 4),
    Part("truck", "trucks", "wheels", 6),
    Part("triangle", "triangles", "sides", 3),
    Part("square", "squares", "sides", 4),
    Part("hand", "hands", "fingers", 5),
    Part("week", "weeks", "days", 7),
    Part("stool", "stools", "legs", 3),
)
COUNTS = range(2, 10)
SEEING = ("sees", "draws", "counts", "finds", "paints", "notes")

# --- stories of sums --------------------------------------------------------------------------
OBJECTS = (
    "apples", "books", "coins", "cards", "eggs", "nuts", "pens", "shells", "stamps", "stones",
)  # fmt: skip
GAINS = ("gets", "buys", "finds", "wins")
LOSSES = ("loses", "sells", "gives away", "uses")
SUM_FIRST = range(2, 11)
SUM_SECOND = range(1, 7)

# --- meetings ---------------------------------------------------------------------------------
TOPICS = (
    "bus lanes", "park hours", "school meals", "street lights", "water rates", "bike paths",
    "noise rules", "tree care", "library fees", "fire safety", "parking fees", "road works",
    "market stalls", "dog permits", "youth sport", "snow removal",
)  # fmt: skip
BODIES = ("bill", "plan", "order", "budget", "contract")
REMARKS = (
    "We heard from three residents.", "The staff report is in your packet.",
    "Thank you all for coming tonight.", "Please turn off your phones.",
    "The committee met last week.", "There is no public comment.",
)  # fmt: skip

# --- code -------------------------------------------------------------------------------------
IDENTIFIERS = (
    "user", "item", "node", "page", "path", "name", "value", "count", "index", "token", "image",
    "model", "score", "title", "group", "color",
)  # fmt: skip
CLASSES = ("Parser", "Reader", "Writer", "Client", "Server", "Loader", "Worker", "Handler")

# --- German: hard word, easy word ---------------------------------------------------------------
GERMAN_SUBJECTS = (
    ("Die Gemeindeverwaltung", "Die Stadt"),
    ("Der Regierungsrat", "Die Regierung"),
    ("Das Unternehmen", "Die Firma"),
    ("Die Bildungseinrichtung", "Die Schule"),
    ("Die Ordnungsbehörde", "Die Polizei"),
    ("Das Krankenhaus", "Das Spital"),
    ("Die Bahngesellschaft", "Die Bahn"),
    ("Der Verkehrsverein", "Der Verein"),
)
GERMAN_VERBS = (
    ("reduziert", "senkt"),
    ("errichtet", "baut"),
    ("untersagt", "verbietet"),
    ("initiiert", "startet"),
    ("präsentiert", "zeigt"),
    ("eliminiert", "streicht"),
    ("modifiziert", "ändert"),
    ("akquiriert", "kauft"),
    ("kontrolliert", "prüft"),
    ("finanziert", "zahlt"),
)
GERMAN_TIMES = (
    ("gegenwärtig", "jetzt"),
    ("in absehbarer Zeit", "bald"),
    ("im kommenden Jahr", "nächstes Jahr"),
    ("am morgigen Tag", "morgen"),
    ("zu keinem Zeitpunkt", "nie"),
    ("in regelmässigen Abständen", "oft"),
)
GERMAN_OBJECTS = (
    ("die Entgelte", "die Preise"),
    ("die Kraftfahrzeuge", "die Autos"),
    ("die Wohngebäude", "die Häuser"),
    ("die Unterrichtsstunden", "die Kurse"),
    ("die Grünanlagen", "die Parks"),
    ("die Veranstaltungen", "die Feste"),
    ("die Publikationen", "die Bücher"),
    ("die Parkflächen", "die Parkplätze"),
)
GERMAN_SECONDS = (
    "Viele Leute freuen sich.", "Das kostet viel Geld.", "Die Zeitung schreibt darüber.",
    "Die Arbeit dauert zwei Wochen.", "Niemand weiss warum.", "Am Abend gibt es Musik.",
)  # fmt: skip
