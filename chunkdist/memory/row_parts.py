"""What one rank needs under sequence parallelism: of P ranks, it has 1/P of the tokens of each chunk, and K/V
of all tokens for 1/P of the heads.

So its memory is that of rows and chunks 1/P as long, but for two things: kv heads that are fewer than the
ranks are repeated, and attention's output is there twice in a graph, by heads and by tokens.
"""

from __future__ import annotations

from dataclasses import replace

from chunkdist.config import ChunkConfig
from chunkdist.memory.cell_sizes import CellSizes, Line
from chunkdist.memory.model_sizes import ModelSizes


def sizes_of_part(sizes: ModelSizes, num_ranks: int) -> ModelSizes:
    """Sizes by token of a rank's part of the rows."""
    if num_ranks == 1:
        return sizes
    return replace(
        sizes, cells=tuple(_cell(cell, num_ranks, sizes.stream.hidden_bytes) for cell in sizes.cells)
    )


def config_of_part(config: ChunkConfig, num_ranks: int) -> ChunkConfig:
    """The schedule of a rank's part of the rows. `config` has a number in `chunk_size`."""
    return replace(config, chunk_size=max(1, int(config.chunk_size) // num_ranks))


def exchanged_bytes(sizes: ModelSizes, config: ChunkConfig, num_tokens: int, again: float) -> float:
    """What goes through the all-to-alls of one rank in a step, its own part included.

    Args:
        sizes: Of a rank's part.
        num_tokens: Of a rank's part of all rows.
        again: The share of the tokens that are run again.
    """
    hidden = sizes.stream.hidden_bytes
    attending = [cell for cell in sizes.cells if cell.kv_bytes]
    once = sum(2 * hidden + cell.kv_bytes for cell in attending)  # q, k and v to the heads, the output back
    rebuilt = sum(cell.kv_bytes for cell in attending) if config.rebuilds_kv else 0
    return num_tokens * ((2 + again) * once + rebuilt)


def _cell(cell: CellSizes, num_ranks: int, hidden_bytes: int) -> CellSizes:
    if not cell.kv_bytes:
        return cell
    repeated = max(1, num_ranks // max(1, cell.kv_heads))

    def with_output(line: Line) -> Line:
        return replace(line, per_token=line.per_token + hidden_bytes)

    return replace(
        cell,
        saved=with_output(cell.saved),
        attention=with_output(cell.attention),
        elsewhere=with_output(cell.elsewhere),
        workspace_per_key=cell.workspace_per_key * repeated,
        kv_bytes=cell.kv_bytes * repeated,
        kv_numbers=cell.kv_numbers * repeated,
        kv_heads=cell.kv_heads * repeated,
    )
