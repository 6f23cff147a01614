"""An import from start to end: open, check every number, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_qoq.checkpoint import card, stream
from vllm_qoq.checkpoint.folder import TensorInfo, side_files
from vllm_qoq.checkpoint.format import (
    KVCache,
    Section,
    join_name,
    split_layer,
    split_name,
)
from vllm_qoq.checkpoint.kv_config import Bits
from vllm_qoq.checkpoint.output import check_space
from vllm_qoq.checkpoint.output_config import output_config
from vllm_qoq.checkpoint.shards import (
    MAX_SHARD_BYTES,
    RECIPE,
    Content,
    Shards,
    cut,
    is_told_anew,
    total_bytes,
    write_checkpoint,
)
from vllm_qoq.importer.detect import KV_SCALE, Kind
from vllm_qoq.importer.imported import ImportedSet, Opened, make_set, open_source
from vllm_qoq.importer.inputs import local_inputs
from vllm_qoq.importer.tiles import S2Order
from vllm_qoq.progress import Progress
from vllm_qoq.routing.table import Routing


@dataclass(frozen=True)
class Imported:
    """The result of an import, as written or, in a dry run, as it would be.

    kind                  the format that the weights had
    layers                how many linear layers are quantized
    is_s2_order_repaired  whether the second level was in deepcompressor's channel order
    dropped               tensors of the source that have no place in our format
    notes                 what was done besides copying, a sentence each
    """

    kind: Kind
    layers: int
    is_s2_order_repaired: bool
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    shards: Shards
    section: Section

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return total_bytes(self.shards)


def import_checkpoint(
    source: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    kv_bits: Bits | None = None,
    s2_order: S2Order | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> Imported:
    """Read a checkpoint of QServe or deepcompressor into one of ours.

    source    folder with the weights, or its id on the Hugging Face Hub, which is downloaded first
    base      folder with config.json and tokenizer of the model that was quantized, or its id
    output    the folder to make
    kv_bits   what K and V were prepared for; by default 4 for QoQ, 16 for W8A8
    s2_order  who packed one with groups, where the numbers do not show it; by default QServe
    dry_run   check everything and write nothing
    overwrite replace an older output, if it is ours
    quiet     print no progress

    Raises UserError with what is wrong and what to do, before anything is written; an output is
    complete or absent.
    """
    out = Path(output)
    source, base = local_inputs(source, base, out, overwrite=overwrite, quiet=quiet)
    progress = Progress(quiet)
    opened = open_source(source, base, s2_order)
    made = make_set(opened, base, progress)
    shards = _shards(made)
    imported = Imported(
        kind=opened.kind,
        layers=len(opened.model.linears),
        is_s2_order_repaired=opened.layers.repaired,
        dropped=tuple(opened.dropped),
        notes=tuple(_notes(opened)),
        shards=shards,
        section=_section(made, kv_bits),
    )
    check_space(out, imported.total_bytes)
    if not dry_run:
        write_checkpoint(out, _content(made, imported, out.name), overwrite, progress)
    return imported


def _shards(made: ImportedSet) -> Shards:
    """Cut the shared tensors, and those of the only set, into files."""
    shared, own = [], []
    for name, info in made.tensors.items():
        if split_layer(name)[0] in made.opened.model.linears:
            own.append(TensorInfo(join_name(made.name, name), info.dtype, info.shape, ""))
        else:
            shared.append(info)
    groups = (sorted(group, key=lambda info: info.name) for group in (shared, own))
    return cut(groups, MAX_SHARD_BYTES)


def _content(made: ImportedSet, imported: Imported, name: str) -> Content:
    base = made.checkpoint.path
    text = card.text(
        name,
        imported.section,
        sizes=_bytes_of_sets(imported, made.name),
        inputs=[base],
        notes=imported.notes,
    )
    others: dict[str, bytes | Path] = {card.README: text.encode()}
    if (base / RECIPE).is_file():
        others[f"recipe-{made.name}.yaml"] = base / RECIPE
    return Content(
        shards=imported.shards,
        read=lambda info: made.get(split_name(info.name, [made.name])[1]),
        config=output_config(made.checkpoint.config, imported.section),
        copied={file: base / file for file in side_files(base) if not is_told_anew(file)},
        others=others,
    )


def _bytes_of_sets(imported: Imported, set_name: str) -> Mapping[str | None, int]:
    sizes: dict[str | None, int] = {None: 0, set_name: 0}
    for info in (info for shard in imported.shards.values() for info in shard):
        sizes[split_name(info.name, [set_name])[0]] += info.nbytes
    return sizes


def _section(made: ImportedSet, kv_bits: Bits | None) -> Section:
    """Make the `quantization_config` of the output."""
    bits: Bits = kv_bits or (16 if made.opened.kind == "w8a8" else 4)
    return Section(
        sets={made.name: dict(made.config)},
        routing=Routing.forced(made.name),
        kv_cache=KVCache(bits=bits),
        stream=stream.of_source(made),
    )


def _notes(opened: Opened) -> list[str]:
    """Say what an import did besides copying, for the model card and the terminal."""
    notes = []
    if scales := sum(name.endswith(KV_SCALE) for name in opened.dropped):
        notes.append(
            f"left out {scales} static KV cache scales ({KV_SCALE}): the cache is quantized per "
            "token here"
        )
    if others := len(opened.dropped) - scales:
        notes.append(f"left out {others} constants that the model computes (rotary_emb.inv_freq)")
    if opened.layers.repaired:
        notes.append(
            "put level-2 scales and zeros from deepcompressor's channel order right; "
            f"{opened.layers.proofs} of {len(opened.model.linears)} layers prove that order"
        )
    elif opened.layers.is_order_guessed:
        notes.append(
            "took level-2 scales and zeros in QServe's channel order, which no layer proves; if "
            "the model talks nonsense, import it again with --s2-order deepcompressor"
        )
    return notes
