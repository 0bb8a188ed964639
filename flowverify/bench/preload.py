"""What every worker needs, loaded once by the process that they are forked from; nothing is computed here."""

import gc

import flowverify.bench.kinds
import flowverify.bench.limits
import flowverify.bench.session

try:
    import flowverify.certify.make  # noqa: F401
except ImportError:  # auto_LiRPA is missing: the jobs that need it say so
    pass
flowverify.bench.limits.environment()
gc.collect()
gc.freeze()  # what is here stays: collections in the workers need not look at it, nor copy its pages
