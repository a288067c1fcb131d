"""Names of weights in a live model of transformers, and in the files that it was loaded from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def names_when_loaded(folder: Path, stored: Iterable[str]) -> dict[str, str]:
    """By its name in the loaded model, the name of each tensor in a Hugging Face folder.

    transformers renames weights when it loads some kinds of models, and names them back when it
    saves them: ``language_model.model.norm.weight`` of LLaVA's files is
    ``model.language_model.norm.weight`` in the model. An adapter of PEFT has the latter names.

    Tensors that are joined or cut when loaded are not in the result; nothing is, where
    transformers does not know the model or cannot make it of the folder's ``config.json``.
    """
    import torch
    import transformers
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0])
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            return {}
        with torch.device("meta"):
            model = kind(config)
    except Exception:  # values that make no sense can fail as anything
        return {}
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    live = model.state_dict()
    found = {}
    for name in stored:
        renamed, converted = rename_source_key(
            name, renamings, converters, model.base_model_prefix, live
        )
        if converted is None and renamed in live:
            found[renamed] = name
    return found
