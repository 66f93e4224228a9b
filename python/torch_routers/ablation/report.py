"""The table: a line in the console as each row ends, and ``table.md``."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from torch_routers.ablation.presets import Settings
from torch_routers.ablation.run import RowResult, versions
from torch_routers.ablation.split import SplitText
from torch_routers.ablation.statistics import CONFIDENCE, difference, spread
from torch_routers.ablation.tokens import TokenText
from torch_routers.metrics import ACTIVE_SHARE

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Args:
        heading: its name.
        show: what it says of a row, given the baseline.
        spreads: whether that includes the spread over several seeds.
    """

    heading: str
    show: Callable[[RowResult, RowResult], str]
    spreads: bool = False


def _measure(heading: str, measure: str, digits: int) -> Column:
    def show(row: RowResult, baseline: RowResult) -> str:
        values = row.values(measure)
        return NOTHING if values[0] is None else spread(values).text(digits)

    return Column(heading, show, spreads=True)


def _thousands(heading: str, measure: str) -> Column:
    return Column(heading, lambda row, _: f"{spread(row.values(measure)).mean / 1000:,.0f}")


def _difference(row: RowResult, baseline: RowResult) -> str:
    if row.name == baseline.name:
        return NOTHING
    pairs = zip(row.values("bits_per_byte"), baseline.values("bits_per_byte"), strict=True)
    return spread([value - base for value, base in pairs]).text(3)


COLUMNS = (
    Column("row", lambda row, baseline: row.name),
    _measure("bits/byte", "bits_per_byte", 3),
    Column("difference", _difference, spreads=True),
    _measure("load CV", "load_cv", 2),
    _measure("MI, bits", "mutual_information", 3),
    _measure("active experts", "active_experts", 1),
    _measure("experts/token", "slots_per_token", 2),
    _measure("CPU s", "cpu_seconds", 0),
    _measure("tokens/CPU s", "tokens_per_cpu_second", 0),
    _thousands("parameters, k", "parameters"),
    _thousands("active, k", "active_parameters"),
)
LEARNING_RATE = Column("learning rate", lambda row, _: f"{row.learning_rate:g}")


def console_line(row: RowResult | None, baseline: RowResult | None, settings: Settings) -> str:
    """A row in columns of fixed width; without a row, the headings."""
    seeds = len(settings.seeds)
    cells = []
    for column in _columns(settings):
        text = column.show(row, baseline) if row and baseline else column.heading
        width = max(len(column.heading), len(" 1.234"))
        if column.spreads and seeds > 1:
            width = max(width, len("-1.234 ± 0.005"))
        cells.append(text.rjust(width) if cells else text.ljust(len("softmax-unbalanced")))
    return "  ".join(cells).rstrip()


def _columns(settings: Settings) -> tuple[Column, ...]:
    """What was chosen is told only where there was a choice."""
    return (*COLUMNS, LEARNING_RATE) if len(settings.learning_rates) > 1 else COLUMNS


def conclusions(
    rows: Sequence[RowResult], baseline: RowResult, learning_rates: Sequence[float]
) -> list[str]:
    """What the numbers can and cannot tell about the differences to the baseline."""
    return [
        *_differences(rows, baseline),
        *_ends_of_the_range(rows, learning_rates),
        *_disturbances(rows),
    ]


def _differences(rows: Sequence[RowResult], baseline: RowResult) -> list[str]:
    seeds = len(baseline.records)
    if seeds == 1:
        return [
            "One seed shows no spread between seeds. It may not be concluded that any row is "
            "better than another: another seed may reverse differences like these. Repeat with "
            "--seeds 0 1 2."
        ]
    lines = []
    for row in rows:
        found = difference(row.values("bits_per_byte"), baseline.values("bits_per_byte"))
        if row.name == baseline.name or found is None:
            continue
        told = "distinguishable" if abs(found.mean) > found.margin else "not distinguishable"
        lines.append(
            f"{row.name}: {found.mean:+.3f} ± {found.margin:.3f}, {told} from 0; detectable: "
            f"{found.detectable:.3f}."
        )
    if not lines:
        return []
    return [
        f"Differences to {baseline.name} in bits/byte, with 95 % intervals from {seeds} paired "
        f"seeds, and the smallest difference that {seeds} seeds like these detect. If no row "
        f"differed from {baseline.name}, {(1 - CONFIDENCE) * len(lines):.2g} of these "
        f"{len(lines)} would still be told from 0, on average: a narrow win is a reason for more "
        "seeds.",
        *lines,
    ]


def _ends_of_the_range(rows: Sequence[RowResult], learning_rates: Sequence[float]) -> list[str]:
    ends = min(learning_rates), max(learning_rates)
    names = [row.name for row in rows if row.learning_rate in ends]
    if not names or len(learning_rates) == 1:
        return []
    return [
        f"{', '.join(names)}: the best learning rate is the lowest or the highest of those tried; "
        "a better one may lie beyond."
    ]


def _disturbances(rows: Sequence[RowResult]) -> list[str]:
    """Threads that share a processor with other work wait for each other, and that counts."""
    machines = [record["machine"] for row in rows for record in row.records]
    disturbed = [
        machine["load_average"][0]
        for machine in machines
        if machine["threads"] > 1
        and machine["load_average"]
        and machine["load_average"][0] > machine.get("jobs", 1) * machine["threads"] + 1
    ]
    if not disturbed:
        return []
    return [
        f"{len(disturbed)} of {len(machines)} cells began while the machine did other work (load "
        f"average up to {max(disturbed):.1f}): their CPU seconds are too high. Repeat with --fresh "
        "--threads 1."
    ]


def table_markdown(
    rows: Sequence[RowResult],
    baseline: RowResult,
    settings: Settings,
    text: SplitText,
    tokens: TokenText,
    pictures: dict[str, str],
    pages: dict[str, str],
) -> str:
    """The whole report.

    Args:
        pictures: captions by file name.
        pages: pictures of one row by its name.
    """
    seeds, rates = len(settings.seeds), settings.learning_rates
    notes = f" ± is the standard deviation over {seeds} seeds." if seeds > 1 else ""
    if len(rates) > 1:
        notes += (
            f" Each row has the learning rate, of {_plain(rates)}, that is best for its first seed "
            "on the validation text."
        )
    domains = [
        Column(domain, lambda row, _, domain=domain: _domain_bits(row, domain))
        for domain in tokens.domains
    ]
    parts = [
        "# Router comparison",
        f"Test text, {settings.steps} steps of {settings.batch} × {settings.sequence} tokens; "
        f"`difference` is to `{baseline.name}` in bits/byte, less is better.{notes}",
        _table(rows, baseline, _columns(settings)),
        "Every name leads to a page of pictures:",
        "\n".join(f"- [{row.name}]({pages[row.name]}): {row.describes}" for row in rows),
        f"Load CV: standard deviation of the experts' load over its mean. MI: what an expert "
        f"tells about the domain, in bits. Active experts: at least {ACTIVE_SHARE:.0%} of the "
        "fair share. Experts/token: those that an average token meets. These four are means over "
        "layers. Active parameters: those that an average token meets.",
        "## What may be concluded",
        "\n".join(f"- {line}" for line in conclusions(rows, baseline, rates)),
        "## Bits per byte by domain",
        _table(rows, baseline, [COLUMNS[0], *domains]),
        *(f"![{caption}]({name})\n\n{caption}" for name, caption in pictures.items()),
        "## Text",
        "\n".join(f"- {line}" for line in data_lines(settings, text, tokens)),
        "## Settings",
        ", ".join(f"{name} {_plain(value)}" for name, value in asdict(settings).items()) + ".",
        ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def data_lines(settings: Settings, text: SplitText, tokens: TokenText) -> list[str]:
    """Where the text comes from, what was left out, and how often it is read."""
    training = len(tokens.splits["train"])
    passes = settings.steps * settings.batch / training
    shares = ", ".join(f"{split} {share:,}" for split, share in text.shares.items())
    documents = "; ".join(
        f"{domain} {len(part)} / {len(text.documents['validation'][domain])} / "
        f"{len(text.documents['test'][domain])}"
        for domain, part in text.documents["train"].items()
    )
    unused = ", ".join(f"{split} {count}" for split, count in tokens.unused.items())
    return [
        f"{len(text.domains)} domains with equal shares, in bytes per domain: {shares}.",
        f"Documents in training / validation / test: {documents}.",
        f"Training reads its {training:,} sequences {passes:.2f} times. Tokens at the end of a "
        f"domain that fill no sequence: {unused}.",
        *(f"{note}." for note in text.notes),
        f"sha256 of the text: {text.sha256()}.",
    ]


def _table(rows: Sequence[RowResult], baseline: RowResult, columns: Sequence[Column]) -> str:
    lines = [[column.heading for column in columns], ["---"] + ["---:"] * (len(columns) - 1)]
    lines += [[column.show(row, baseline) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _domain_bits(row: RowResult, domain: str) -> str:
    return spread([bits[domain] for bits in row.values("bits_per_byte_by_domain")]).text(3)


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
