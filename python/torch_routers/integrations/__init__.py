"""Bridges to other packages: each imported by you alone, in need of the one it is named after."""
