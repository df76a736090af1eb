"""Operation counts of one prefill: what every layer really computed, and the paper's convention (Table II, "Sparsity").

Counts are multiplications (M·N·K a GEMM) over all layers, visual tokens only.
"""

from dataclasses import dataclass, field

SITES = ("q_proj", "query", "o_proj", "gate_proj", "down_proj")
LINEAR_SITES = ("q_proj", "o_proj", "gate_proj", "down_proj")


@dataclass(frozen=True)
class DecoderShape:
    """The dimensions of a decoder that operation counts depend on."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def query_width(self) -> int:
        """Width of the concatenated queries, heads · head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the concatenated keys (or values), kv_heads · head_dim."""
        return self.kv_heads * self.head_dim

    def site_channels(self, site: str) -> int:
        """Channels a token has at a GEMM site."""
        return {
            "q_proj": self.hidden,
            "query": self.query_width,
            "o_proj": self.query_width,
            "gate_proj": self.hidden,
            "down_proj": self.mlp,
        }[site]

    def site_cost(self, site: str, tokens: int) -> int:
        """Relative cost of a site, the weight of its sparsity in a sample's mean (choice of the median sample)."""
        return {
            "q_proj": self.hidden * (self.query_width + 2 * self.kv_width),
            "query": self.query_width * tokens,
            "o_proj": self.query_width * self.hidden,
            "gate_proj": 2 * self.hidden * self.mlp,
            "down_proj": self.hidden * self.mlp,
        }[site]


@dataclass
class SiteCounts:
    """What one GEMM site saw in one layer, over all S original visual tokens (absent ones count as zero).

    vectors: V, vectors a token. zero, similar: vectors of each kind, out of S·V.
    empty_tokens: tokens that are zero in every vector.
    """

    vectors: int
    zero: int
    similar: int
    empty_tokens: int

    def sparsity(self, tokens: int) -> float:
        """(similar + zero) / (S·V)."""
        return (self.zero + self.similar) / (tokens * self.vectors)

    def rows(self, tokens: int) -> int:
        """Vectors computed per vector column, rounded down: the number of GEMM rows."""
        return int((tokens * self.vectors - self.zero - self.similar) / self.vectors)


@dataclass
class Counts:
    """Per-layer site counts of one prefill over S visual tokens: `layers[l][site]`."""

    tokens: int
    layers: list[dict[str, SiteCounts]] = field(default_factory=list)

    def weighted_sparsity(self, shape: DecoderShape) -> float:
        """Mean site sparsity over layers, weighted by site cost (SPEC of the traces: choice of the median sample)."""
        costs = {site: shape.site_cost(site, self.tokens) for site in SITES}
        total = sum(
            costs[site] * sum(layer[site].sparsity(self.tokens) for layer in self.layers) / len(self.layers)
            for site in SITES
        )
        return total / sum(costs.values())


def linear_operations(shape: DecoderShape) -> dict[str, int]:
    """N·K of the weights fed from each linear site, for one token."""
    return {
        "q_proj": shape.hidden * (shape.query_width + 2 * shape.kv_width),
        "o_proj": shape.query_width * shape.hidden,
        "gate_proj": 2 * shape.hidden * shape.mlp,
        "down_proj": shape.mlp * shape.hidden,
    }


def dense_operations(shape: DecoderShape, tokens: int) -> int:
    """Operations of the dense model's prefill over `tokens` visual tokens, all layers."""
    linear = sum(linear_operations(shape).values())
    return shape.layers * (tokens * linear + tokens**2 * shape.query_width)


def counted_operations(
    shape: DecoderShape, attended: list[int], retained: list[int], rows: list[dict[str, float]]
) -> float:
    """Operations of a prefill, from what each layer really computed: one count for every method.

    Parameters
    ----------
    attended, retained
        Visual tokens that each layer's attention and each layer's MLP see.
    rows
        For each layer, the GEMM rows computed at a site where they are fewer than those tokens: at a linear site, for
        the queries (`query`, a row of QKᵀ each) and for the attention matrix (`score`, a row of PV each). Keys and
        values are those of all attended tokens. May be shorter than the layers.
    """
    total = 0.0
    computed: dict[str, float]
    for layer, (seen, left) in enumerate(zip(attended, retained, strict=True)):
        computed = dict.fromkeys(("q_proj", "query", "score", "o_proj"), seen)
        computed |= dict.fromkeys(("gate_proj", "down_proj"), left)
        computed |= rows[layer] if layer < len(rows) else {}
        total += sum(computed[site] * cost for site, cost in linear_operations(shape).items())
        total += (computed["query"] + computed["score"]) * seen * shape.query_width / 2  # causal: half of each product
    return total


def concentrated_operations(shape: DecoderShape, counts: Counts, *, sec_only: bool = False) -> int:
    """The paper's count of Focus (Table II): computed vectors only; in SEC-only, tokens that enter a layer only."""
    total = 0
    for layer in counts.layers:
        present = counts.tokens - layer["query"].empty_tokens
        computed = {site: present if sec_only else layer[site].rows(counts.tokens) for site in SITES}
        total += sum(computed[site] * cost for site, cost in linear_operations(shape).items())
        total += (computed["query"] * present + present * present) * shape.query_width // 2
    return total


def cmc_operations(shape: DecoderShape, tokens: int, linear: float, query: float, score: float) -> float:
    """The paper's count of CMC: each linear by its sparsity, QKᵀ by the query's, PV by the attention matrix's."""
    attention = tokens**2 * shape.query_width / 2
    linears = tokens * sum(linear_operations(shape).values())
    return shape.layers * (linears * (1 - linear) + attention * (1 - query) + attention * (1 - score))
