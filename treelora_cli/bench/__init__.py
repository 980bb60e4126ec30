"""Measurements anybody can repeat: what treelora costs beside plain PEFT, and what it saves."""
