"""Routing: which task a prompt looks like, from the statistics of every task's training prompts.

Pure tensors: nothing here knows of transformers, peft, files or the command line. Start with
``statistics.FeatureStatistics`` (what a task keeps) and ``router.Router`` (who answers);
``beam`` searches a tree over the tasks where they are too many to compare with one by one,
``quality`` says how well the routing went.
"""
