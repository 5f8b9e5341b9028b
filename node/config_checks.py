"""What the configuration model cannot check by itself: calculations and their parameters, and field mappings.

``load_config(path, config_checks(path.parent))`` refuses these too, with their lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tickmesh.control.config import Checks, RawTables, Refusal, Source
from tickmesh.node.calculation import PlanError, plan
from tickmesh.node.fields import check_source
from tickmesh.node.fix_mapping import check_fix_source
from tickmesh.node.reader import check_price_scale


def config_checks(folder: Path) -> Checks:
    """The hooks for :func:`tickmesh.control.config.load_config`.

    Args:
        folder: where the files of user calculations are, which are loaded to see their parameters, and FIX dictionaries.
    """

    def processing(calculations: RawTables, alerts: RawTables, bars: RawTables) -> Iterable[Refusal]:
        try:
            plan(calculations, alerts, bars, folder)
        except PlanError as error:
            return [Refusal(problem.path, problem.reason, problem.hint) for problem in error.problems]
        return []

    def source(name: str, options: Source) -> Iterable[Refusal]:
        return [*check_source(name, options), *check_fix_source(name, options, folder), *check_price_scale(options)]

    return Checks(processing, source)
