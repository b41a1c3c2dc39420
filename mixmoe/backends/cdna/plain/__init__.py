"""Recipes without scaled MFMAs: plain sums, and scales put onto them.

gfx942 has nothing else; on gfx950 these are the recipes that are not MX on both sides.
"""
