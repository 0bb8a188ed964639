"""What every worker needs, loaded once by the process that they are forked from; nothing is computed here."""

import flowverify.bench.kinds
import flowverify.bench.session

try:
    import flowverify.certify.make  # noqa: F401
except ImportError:  # auto_LiRPA is missing: the jobs that need it say so
    pass
