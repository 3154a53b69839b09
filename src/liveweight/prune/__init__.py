"""Pruning: score connections, select, mask, keep the masks while training.

The verbs are `score`, `prune_`, `cluster_`, `keep_masks`, `strip_`, `masks`, `apply_masks_`,
`rewind_` and `recalibrate_bn_`; `importances` is the registry of criteria, `Importance` what one
must offer.
"""

from liveweight.nn import ShortcutMask
from liveweight.prune.activity import Activity, Observer
from liveweight.prune.activity_criteria import Ria, Wanda
from liveweight.prune.adapt import AdaptReport, adapt_
from liveweight.prune.arrange import cluster_rows
from liveweight.prune.brain_damage import Obd, ObdSd
from liveweight.prune.brain_surgeon import Obs, SparseGpt
from liveweight.prune.burden import BurdenReport, BurdenRow, burden
from liveweight.prune.callbacks import lightning_callback, transformers_callback
from liveweight.prune.cluster import cluster_
from liveweight.prune.cluster_report import ClusterReport, ClusterRow
from liveweight.prune.dropout_damage import DropoutDamage
from liveweight.prune.gradient_criteria import Snip, Taylor
from liveweight.prune.hyper_hypo import HyperHypo, Salience, find_hyper_hypo, remove_units_
from liveweight.prune.importances import (
    Importance,
    LayerScore,
    Magnitude,
    Random,
    Target,
    importances,
    register_importance,
)
from liveweight.prune.keep import MaskKeeper, keep_masks
from liveweight.prune.mask import apply_masks_, copy_masks_, masks, strip_
from liveweight.prune.merge import merge_
from liveweight.prune.nnrelief import NNRelief
from liveweight.prune.pruner import Pruner
from liveweight.prune.quantize import QuantizedRow, quantize_weights_
from liveweight.prune.report import LayerRow, PruneReport, Scores
from liveweight.prune.retrain import load_state_, recalibrate_bn_, rewind_
from liveweight.prune.schedule import Cubic, Iterative, OneShot, Schedule, Then
from liveweight.prune.structure import check_structure
from liveweight.prune.unit_criteria import Apoz, FiringRate
from liveweight.prune.verbs import prune_, score
from liveweight.prune.weight_criteria import Lamp

__all__ = [
    "remove_units_",
    "find_hyper_hypo",
    "Salience",
    "HyperHypo",
    "adapt_",
    "AdaptReport",
    "burden",
    "BurdenRow",
    "BurdenReport",
    "Then",
    "Schedule",
    "OneShot",
    "Iterative",
    "Cubic",
    "Pruner",
    "transformers_callback",
    "lightning_callback",
    "quantize_weights_",
    "QuantizedRow",
    "merge_",
    "SparseGpt",
    "Obs",
    "DropoutDamage",
    "FiringRate",
    "Apoz",
    "Wanda",
    "Taylor",
    "Snip",
    "Ria",
    "ObdSd",
    "Obd",
    "Lamp",
    "Activity",
    "ClusterReport",
    "ClusterRow",
    "Importance",
    "LayerRow",
    "LayerScore",
    "Magnitude",
    "MaskKeeper",
    "NNRelief",
    "Observer",
    "PruneReport",
    "Random",
    "Scores",
    "ShortcutMask",
    "Target",
    "apply_masks_",
    "check_structure",
    "cluster_",
    "cluster_rows",
    "copy_masks_",
    "importances",
    "keep_masks",
    "load_state_",
    "masks",
    "prune_",
    "recalibrate_bn_",
    "register_importance",
    "rewind_",
    "score",
    "strip_",
]
