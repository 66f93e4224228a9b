"""Benchmarks: ``make bench``. One file per operator or layer; pytest does not collect them."""
