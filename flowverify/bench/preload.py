"""What every worker needs, loaded once by the process that they are forked from; nothing is computed here."""

import gc
from contextlib import suppress

import flowverify.bench.session
from flowverify.bench.tasks import KINDS
from flowverify.registry import METHODS

for name in KINDS:
    KINDS.find(name)
with suppress(ImportError):  # auto_LiRPA is missing: the jobs that need it say so
    for name in METHODS:
        METHODS.find(name)
flowverify.bench.session.environment()
gc.collect()
gc.freeze()  # what is here stays: collections in the workers need not look at it, nor copy its pages
