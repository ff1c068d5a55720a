"""Bayou beside other programs: what a .bayou file becomes where only their own formats are read."""
