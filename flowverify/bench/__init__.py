"""Batch runs: suites of jobs, a store that survives being killed, runners on one machine and on many, reports."""
