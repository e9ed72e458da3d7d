"""Patch tokens -> one box per image: LOST (BMVC 2021) and SoLOST (2022), batched.

``localize.py`` is the door; ``seed_expansion.py`` holds the rule in which the methods differ.
"""
