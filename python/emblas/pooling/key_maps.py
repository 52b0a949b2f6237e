"""Names of parameters in published checkpoints, and what the modules here call them.

Each map gives, for the start of a published key, the start of ours:

==============  ==========================================  ==============================
map             published by                                module
==============  ==========================================  ==============================
`NV_EMBED`      NV-Embed v1 and v2,                         `LatentAttentionPooling`
                prefix ``latent_attention_model.``
`PMA`           C2LLM and CodeFuse-CGE (``post_normal``),   `AttentionPooling`
                prefix ``mha_pma.``
`MULTI_LAYER`   PoolingAndAttn (arXiv 2409.02727)           `LayerPooling`
==============  ==========================================  ==============================
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_CROSS_ATTENTION = {
    "latents": "latents",
    "cross_attend_blocks.0.norm.": "norm.",
    "cross_attend_blocks.0.norm_context.": "norm_context.",
    "cross_attend_blocks.0.fn.to_": "to_",
    "cross_attend_blocks.1.norm.": "norm_ff.",
    "cross_attend_blocks.1.fn.net.0.": "ff_in.",
    "cross_attend_blocks.1.fn.net.2.": "ff_out.",
}
NV_EMBED = _CROSS_ATTENTION
MULTI_LAYER = {**_CROSS_ATTENTION, "pos_emb.": "layer_embedding."}
PMA = {"S": "S", "mab.fc_": "fc_", "mab.ln0.": "ln0.", "mab.ln1.": "ln1."}


def renamed(
    state_dict: Mapping[str, Tensor], key_map: Mapping[str, str], prefix: str = ""
) -> dict[str, Tensor]:
    """Rename the entries of a published state dict for ``load_state_dict``.

    Parameters
    ----------
    state_dict : mapping of str to Tensor
        Of the published model, or of a part of it.
    key_map : mapping of str to str
        One of the maps of this module.
    prefix : str, default ""
        Where the part begins in ``state_dict``; other entries are left out.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    ValueError
        If no entry has the prefix, or one of them isn't in the map.

    Examples
    --------
    >>> pooling = LatentAttentionPooling()
    >>> published = renamed(checkpoint, key_maps.NV_EMBED, "latent_attention_model.")
    >>> pooling.load_state_dict(published)
    """
    out = {}
    for key, value in state_dict.items():
        if not key.startswith(prefix):
            continue
        rest = key.removeprefix(prefix)
        start = next((start for start in key_map if rest.startswith(start)), None)
        if start is None:
            raise ValueError(f"state_dict must hold keys of the map under {prefix!r}, got {key!r}")
        out[key_map[start] + rest.removeprefix(start)] = value
    if not out:
        raise ValueError(f"state_dict must hold keys that start with {prefix!r}, got none")
    return out
