"""Patch features -> one box per image: LOST (BMVC 2021) and SoLOST (2022), batched.

``localize.py`` is the door; ``seed_expansion.py`` holds the rule in which the methods differ,
``affinity.py`` who is similar to whom, ``components.py`` which patches hang together. Tensors in,
tensors out: no model, no file, no configuration but the names of the rules.
"""
