# SPDX-License-Identifier: Apache-2.0
"""Models of the packages that docs/adoptions.md names, and the lines that the page has for each.

The packages' own weights cannot be had here. Theirs are random ones, perturbed: at the default
initialisation many projections are zero, and attention changes nothing. benchmarks/adoptions.py
measures the same models.
"""

import re
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parents[2] / "docs" / "adoptions.md"
FEATURES = 20


def lines(heading):
    """Return the blocks of Python below a heading of the page."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S)


def perturbed(model, size=0.03):
    """Return the model, with noise in each of its weights."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn_like(weight)
    return model.eval()


def table(rows):
    """Return rows of features, and the classes of all but the last sixth, which are to be found."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows + rows // 5, FEATURES))
    classes = (x[:rows, 0] > 0).astype(int) + (x[:rows, 1] * x[:rows, 2] > 0)
    return x[:rows], classes, x[rows:]


def tabpfn(architecture, rows, precision, **sizes):
    """Return a TabPFN that has seen its rows, as a call that gives the others' probabilities."""
    import tabpfn
    import torch
    from tabpfn.architectures import ARCHITECTURES
    from tabpfn.constants import ModelVersion
    from tabpfn.inference_config import InferenceConfig

    module = ARCHITECTURES[architecture]
    config, _ = module.parse_config({"max_num_classes": 10, "num_buckets": 100, **sizes})
    torch.manual_seed(0)
    specs = tabpfn.ModelSpecs(
        perturbed(module.get_architecture(config)),
        config,
        InferenceConfig.get_default("multiclass", ModelVersion.V2_5),
    )
    classifier = tabpfn.TabPFNClassifier(
        model_path=specs, device="cpu", n_estimators=1, inference_precision=precision
    )
    seen, classes, unseen = table(rows)
    classifier.fit(seen, classes)
    return lambda: classifier.predict_proba(unseen)


def tabicl(folder, rows, **sizes):
    """Return a TabICL that has seen its rows, as a call that gives the others' probabilities."""
    import tabicl
    import torch
    from tabicl._model.tabicl import TabICL

    torch.manual_seed(0)
    config = {"max_classes": 10, **sizes}
    path = Path(folder) / "model.ckpt"
    torch.save({"config": config, "state_dict": perturbed(TabICL(**config)).state_dict()}, path)
    classifier = tabicl.TabICLClassifier(model_path=path, device="cpu", n_estimators=1)
    seen, classes, unseen = table(rows)
    classifier.fit(seen, classes)
    return lambda: classifier.predict_proba(unseen)


def anemoi_layer(heads, width, **options):
    """Return anemoi's attention layer, as a call on the states of a batch's tokens."""
    import torch
    from anemoi.models.distributed.shapes import GraphShardInfo
    from anemoi.models.layers.attention import MultiHeadSelfAttention
    from anemoi.utils.config import DotDict

    kernels = DotDict(Linear=torch.nn.Linear)
    torch.manual_seed(0)
    layer = perturbed(MultiHeadSelfAttention(heads, width, kernels, **options))
    return layer, lambda x, batch=1: layer(x, GraphShardInfo(), batch)


def triangle_attention(package, width, heads, head_dim):
    """Return the triangle attention of openfold3 or boltz, a module for (x, mask)."""
    import importlib

    import torch

    place = {
        "boltz": "boltz.model.layers.triangular_attention.attention",
        "openfold3": "openfold3.core.model.layers.triangular_attention",
    }
    torch.manual_seed(0)
    kind = importlib.import_module(place[package]).TriangleAttention
    return perturbed(kind(width, head_dim, heads), 0.2)
