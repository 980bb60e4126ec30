"""The gradient tree: task signatures, the tree over them, the bandit search and the penalty.

Pure tensors: nothing here knows of transformers, peft, files or the command line. Start with
``signatures.SignatureBank``, then ``build.update_tree``, ``search.make_search`` and
``penalty.PathTargets``; ``serial`` writes and reads the result, ``render`` shows it.
"""
