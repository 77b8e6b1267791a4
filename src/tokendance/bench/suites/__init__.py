"""The benchmark suites, one file each."""
