"""The kinds of jobs by name."""

from __future__ import annotations

from flowverify.bench.attack_kind import Attack
from flowverify.bench.certify_kind import Certify
from flowverify.bench.instances_kind import Instances
from flowverify.bench.script_kind import Script
from flowverify.bench.tasks import Kind

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Certify(), Attack(), Instances(), Script())}
