"""What every worker needs, loaded once by the process that they are forked from; nothing is computed here."""

import gc
from contextlib import suppress

import flowverify.bench.kinds
import flowverify.bench.limits
import flowverify.bench.session

with suppress(ImportError):  # auto_LiRPA is missing: the jobs that need it say so
    import flowverify.certifiers.make
flowverify.bench.limits.environment()
gc.collect()
gc.freeze()  # what is here stays: collections in the workers need not look at it, nor copy its pages
