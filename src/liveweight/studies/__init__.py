"""Studies: grids of training runs that compare methods on real data, and their pages."""

from __future__ import annotations

from liveweight.studies import hyper_hypo
from liveweight.studies.burden import BURDEN
from liveweight.studies.comparison import COMPARISON
from liveweight.studies.grid import Study

STUDIES: dict[str, Study] = {study.name: study for study in (COMPARISON, hyper_hypo.STUDY, BURDEN)}
