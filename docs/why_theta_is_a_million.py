# %% [markdown]
# # Why θ is a million
#
# Code Llama is Llama 2, trained further on code. Of its architecture one number changed that is not a size: the θ of
# its rotary positions, from 10,000 to 1,000,000 (arXiv 2308.12950, section 2.4). This chapter says what that number
# does. It begins with a model that cannot tell order, and ends with the reason for a million.
#
# Every step is run on the small checkpoint that comes with the package, and drawn. Run the chapter as a script,
# `python docs/why_theta_is_a_million.py`, or cell by cell in an editor that knows `# %%`. Its pictures go into
# `docs/images`, or where `--out` says.

# %%
import argparse
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from llama import Llama
from llama.evals.positions import loss_by_position
from llama.evals.record import picture
from llama.evals.sources import File
from llama.evals.table import render
from llama.generation import EMBEDDED
from llama.rope import SPECTRA, Spectrum, default, rotate, rotation_tables, spectrum

try:
    import matplotlib
    from PIL import Image  # which matplotlib itself needs
except ImportError as error:
    raise SystemExit("this chapter is drawn by matplotlib: pip install 'codellama[plot]'") from error

HERE = Path(__file__).parent if "__file__" in globals() else Path("docs")
parser = argparse.ArgumentParser(description="From why rotate to why theta is a million, step by step, with pictures.")
parser.add_argument("--out", type=Path, default=HERE / "images", help="folder of the pictures (default: %(default)s)")
parser.add_argument("--stretch", type=float, default=4, help="read up to so many trained lengths (default: 4)")
parser.add_argument("--documents", type=int, default=4, help="how many texts a loss is the mean of (default: 4)")
options = parser.parse_known_args()[0]  # a notebook's kernel has options of its own
if options.stretch < 1.25:
    parser.error(
        f"--stretch is {options.stretch}; give at least 1.25, so that something is read past the trained length"
    )
options.out.mkdir(parents=True, exist_ok=True)


def show(name):
    """Says what a picture is called; in a notebook, shows it."""
    path = options.out / f"{name}.png"
    image = Image.open(path).convert("RGB").quantize(160)  # so many colours do, in a third of the bytes
    image.save(path, optimize=True)
    if "IPython" in sys.modules:
        from IPython.display import display

        display(image)
    print(f"[picture: {path.name}]\n")


# %% [markdown]
# The model card beside the checkpoint says how it was trained. What follows is computed from what is found there, so
# the chapter stays true when a better checkpoint takes its place.

# %%
llama = Llama.build(max_batch_size=1)
args = llama.model.args
D, THETA = args.head_dim, args.rope_theta

context = re.search(r"\| context \| .*?([\d,]+) tokens", (EMBEDDED / "MODEL_CARD.md").read_text(encoding="utf-8"))
assert context is not None, "the model card has no row `| context | … tokens |`"
TRAINED = int(context[1].replace(",", ""))
print(f"The checkpoint: {args.n_layers} layers, {args.n_heads} heads of {D} numbers, θ = {THETA:,.0f},")
print(f"trained on up to {TRAINED:,} tokens at a time. Drawn by matplotlib {matplotlib.__version__}.\n")

# %% [markdown]
# ## 1. Without positions there is no order
#
# A block of the model does two things. Feed-forward works on each token by itself. Attention adds up what all tokens
# offer, each weighted by how well its key fits the query. A sum doesn't know in which order its terms came.
#
# So take away the rotation, and let every token see every other. Then shuffle all that stands before the last token.
# What the model expects next must stay the same, up to the rounding of float32.


# %%
def see_everything(q, keys, values, span):
    """Attention without a mask: q (B, H, T, D), keys and values (B, K, S, D)."""
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


@torch.inference_mode()
def next_token(llama, ids):
    """The probability (V,) of each token to come next."""
    return llama.model(ids[None])[0, -1].softmax(-1)


def changes(llama):
    """By how much each shuffle changes a probability, at most."""
    before = next_token(llama, ids)
    return [float((next_token(llama, ids[order]) - before).abs().max()) for order in orders]


ids = torch.tensor(llama.tokenizer.encode("def subtract(a, b):\n    return a -", bos=True, eos=False))
last, seed = len(ids) - 1, torch.Generator().manual_seed(0)
orders = [torch.tensor([*torch.randperm(last, generator=seed).tolist(), last]) for _ in range(24)]
print("The text:       ", repr(llama.tokenizer.decode(ids.tolist())))
print("A shuffle of it:", repr(llama.tokenizer.decode(ids[orders[0]].tolist())))

blind = Llama.build(max_batch_size=1, rope_scaling={"rope_type": "none"})
for layer in blind.model.layers:
    layer.attention.attend = see_everything
shuffled = {"no rotation, no mask": changes(blind)}
assert max(shuffled["no rotation, no mask"]) < 1e-4

# %% [markdown]
# A real model has a mask: a token sees what stands before it, not what comes after. That alone tells something of
# order, since each token sees one more than the token before. One block can't use it; several together can, and models
# have been trained with nothing else (arXiv 2305.19466). But it is a poor ruler, and this checkpoint was never taught
# to read it.

# %%
masked = Llama.build(max_batch_size=1, rope_scaling={"rope_type": "none"})
shuffled["no rotation, mask"] = changes(masked)

# %% [markdown]
# So each token must be told its place. With the rotation back, a shuffled text is another text. Each dot of the picture
# is one shuffle.

# %%
shuffled["rotation, mask"] = changes(llama)
assert max(shuffled["no rotation, no mask"]) < max(shuffled["rotation, mask"])
for name, found in shuffled.items():
    print(f"{name}: a shuffle changes a probability by up to {max(found):.1e}")

with picture(options.out / "why-theta-1-order.png", 7, 3.6) as figure:
    axes = figure.subplots()
    for column, found in enumerate(shuffled.values()):
        axes.scatter(torch.linspace(-0.15, 0.15, len(found)) + column, [max(f, 1e-9) for f in found], s=12)
    axes.set(yscale="log", ylabel="largest change of a probability", title="All but the last token, shuffled")
    axes.set_xticks(range(len(shuffled)), list(shuffled))
show("why-theta-1-order")

# %% [markdown]
# ## 2. A pair of numbers, turned
#
# RoPE takes the numbers of a query or a key as pairs (arXiv 2104.09864, section 3.2). A pair is an arrow in the plane.
# At place p it is turned by the angle p·w, where w is the pair's own speed.
#
# A score adds up, pair by pair, the product of the query's arrow and the key's. A product depends on the two lengths
# and on the angle between them. Turn one by 7w and the other by 5w: the angle has changed by 2w. Turn them by 5w and
# 3w: by 2w again.


# %%
def at_places(x, cos, sin):
    """One vector x (D,) as it looks at each of P places, (P, D); cos and sin are (P, D/2)."""
    return rotate(x.expand(1, len(cos), 1, len(x)), cos[None, :, None], sin[None, :, None])[0, :, 0]


w = 0.5
arrows = at_places(torch.tensor([1.0, 0.0]), *rotation_tables(Spectrum(torch.tensor([w]).double()), 8, "cpu"))
for m, n in ((7, 5), (5, 3)):
    print(f"places {m} and {n}: the product is {arrows[m] @ arrows[n]:.6f}")
    assert abs(float(arrows[m] @ arrows[n]) - math.cos(2 * w)) < 1e-6

# %% [markdown]
# Now a real query and a real key: those of two tokens in the first block of the checkpoint. Put the query at any place
# m and the key at any place n, and write down every score. Along each diagonal m - n is the same, and so is the score.

# %%
PLACES = 32
with torch.inference_mode():
    block = llama.model.layers[0]
    x = block.attention_norm(llama.model.tok_embeddings(ids[None]))
    q = block.attention.wq(x).unflatten(-1, (-1, D))[0, -1, 0]  # (D,): the last token's query, first head
    k = block.attention.wk(x).unflatten(-1, (-1, D))[0, 1, 0]  # (D,): the key of the first token of the text
    cos, sin = llama.model.rotation(PLACES)
    scores = at_places(q, cos, sin) @ at_places(k, cos, sin).T / math.sqrt(D)  # (m, n)

diagonals = [scores.diagonal(-distance) for distance in range(PLACES)]
spread = max(float(diagonal.max() - diagonal.min()) for diagonal in diagonals)
print(f"Scores go from {scores.min():.2f} to {scores.max():.2f}. Along a diagonal they differ by {spread:.0e} at most.")
assert spread < 1e-4 * float(q.norm() * k.norm())

# %% [markdown]
# What becomes of a score as the distance grows? Each pair gives one wave. Its height comes from the lengths of the two
# arrows, its start from the angle between them, and its speed is w. The score is the sum of D/2 waves and nothing else.

# %%
speeds = spectrum(D, THETA, args.rope_scaling, TRAINED).inv_freq  # (D/2,)
both = torch.view_as_complex(q.double().view(-1, 2)) * torch.view_as_complex(k.double().view(-1, 2)).conj()
distances = torch.arange(PLACES).double()
waves = both.abs() * torch.cos(torch.outer(distances, speeds) + both.angle()) / math.sqrt(D)  # (distance, D/2)
apart = float((waves.sum(1) - torch.stack([diagonal[0] for diagonal in diagonals])).abs().max())
print(f"{D // 2} waves give the model's scores to within {apart:.0e}.")
assert apart < 1e-4 * float(q.norm() * k.norm())

with picture(options.out / "why-theta-2-pair.png", 9, 2.8) as figure:
    left, middle, right = figure.subplots(1, 3)
    for place, (x, y) in enumerate(arrows.tolist()):
        left.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->"})
        left.text(1.2 * x, 1.2 * y, place, ha="center", va="center")
    left.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal", title="One pair at places 0 to 7")
    image = middle.imshow(scores, origin="lower")
    figure.colorbar(image, ax=middle)
    middle.set(xlabel="place of the key, n", ylabel="place of the query, m", title="Score by both places")
    right.plot(distances, waves.sum(1), "k", label="score")
    for pair in (0, D // 8, D // 4):
        right.plot(distances, waves[:, pair], lw=1, label=f"pair {pair}")
    right.set(xlabel="distance, m - n", title="Score: a sum of waves")
    right.legend(fontsize=8)
show("why-theta-2-pair")

# %% [markdown]
# ## 3. The hands of a clock
#
# One wave can't tell distances apart that are a whole turn from each other. So every pair has its own speed, like the
# hands of a clock: w = θ^(-2i/D) for pair i. The first hand turns by one radian a token. Each next one is slower by the
# same ratio, and θ says how slow the last one is.
#
# A hand's wavelength is the number of tokens of one full turn.

# %%
MODELS = {"Llama 2": (128, 1e4, 4096), "Code Llama": (128, 1e6, 16384), "our checkpoint": (D, THETA, TRAINED)}
rows, wavelengths = [], {}
for name, (head_dim, theta, trained) in MODELS.items():
    turns = wavelengths[name] = 2 * math.pi / default(head_dim, theta, trained).inv_freq
    complete = f"{int((turns <= trained).sum())} of {len(turns)}"
    rows.append((name, f"{theta:,.0f}", f"{trained:,}", f"{turns[0]:.2f}", f"{turns[-1]:,.0f}", complete))
print(render(("", "θ", "trained on", "shortest turn", "longest turn", "hands that complete one"), rows))

# %% [markdown]
# The last column is the point. A fast hand has shown every angle in training, many times. A slow one has not completed
# one turn. On a longer text it shows angles that the weights have never met, and nothing has taught them what to do
# then.
#
# On the right of the picture, hand by hand: the part of the circle that was seen in training, and the part that is new
# on a longer text.

# %%
seen = (TRAINED * speeds / (2 * math.pi)).clamp(max=1)
later = (options.stretch * TRAINED * speeds / (2 * math.pi)).clamp(max=1)
unseen = int((later > seen).sum())
print(f"At {options.stretch:g} times the trained length {unseen} of {D // 2} hands show angles that are new.")

with picture(options.out / "why-theta-3-hands.png", 8.6, 3.2) as figure:
    left, right = figure.subplots(1, 2)
    for (name, turns), color in zip(wavelengths.items(), ("C0", "C1", "C2"), strict=True):
        left.plot(torch.arange(len(turns)) / len(turns), turns, ".-", ms=4, lw=0.5, color=color, label=name)
        left.axhline(MODELS[name][2], color=color, lw=0.8, ls="--")
    left.set(yscale="log", xlabel="pair, as a share of all", ylabel="tokens a turn", title="Dashed: the trained length")
    left.legend()
    right.bar(range(D // 2), seen, label=f"seen within {TRAINED:,} tokens")
    right.bar(range(D // 2), later - seen, bottom=seen, label=f"new at {options.stretch * TRAINED:,.0f}")
    right.set(ylim=(0, 1.4), xlabel="pair", ylabel="part of the circle", title="Angles of our checkpoint's hands")
    right.legend()
show("why-theta-3-hands")

# %% [markdown]
# ## 4. What attention expects by distance
#
# Take a query that asks for something like itself: the key is the same vector, n tokens back. At distance 0 all waves
# stand at their top. As n grows they fall out of step, the fast ones first. With all pairs equally long, this is left:
#
# g(n) = sum over i of cos(n·θ^(-2i/D))
#
# Random queries confirm it. We draw g(n) as a share of g(0).


# %%
def g(head_dim, theta, distances):
    """The expectation at each distance, as a share of that at distance 0."""
    return torch.outer(distances.double(), default(head_dim, theta, 0).inv_freq).cos().mean(1)


far = torch.arange(0, 512, 16)
queries = torch.randn(2000, 1, 1, 128, generator=torch.Generator().manual_seed(0))
cos, sin = rotation_tables(default(128, 1e4, 512), 512, "cpu")
turned = rotate(queries, cos[far][None, :, None], sin[far][None, :, None])[:, :, 0]  # (2000, distances, D)
drawn = (turned * queries[:, :, 0]).sum(-1).mean(0) / 128
off = float((drawn - g(128, 1e4, far)).abs().max())
print(f"The mean of {len(queries):,} random queries is at most {off:.3f} away from g(n).")
assert off < 0.02

# %% [markdown]
# The curve ripples, since the fast hands never agree for long, and it sinks, as one slow hand after the other turns
# away. At some distance it first dips below zero: there a query expects less of its own likeness than of something
# unrelated. For heads of 128 numbers, as Llama's, that is at 1,707 tokens with θ = 10,000, at 18,438 with θ = 500,000,
# and at 27,115 with θ = 1,000,000. A larger θ makes all hands but the first slower, so they stay in step for longer.


# %%
def first_zero(head_dim, theta, distances):
    """The first distance at which g is below zero; None where there is none."""
    return next((n for n, value in enumerate(g(head_dim, theta, distances).tolist()) if value < 0), None)


distances = torch.arange(40_000)
zeros = {theta: first_zero(128, theta, distances) for theta in (1e4, 5e5, 1e6)}
for theta, zero in zeros.items():
    print(f"D = 128, θ = {theta:,.0f}: g(n) is first below zero at n = {zero:,}")
assert zeros == {1e4: 1707, 5e5: 18438, 1e6: 27115}

# %% [markdown]
# The arrows of a trained model are not equally long. So let the keys of the checkpoint's first block ask for
# themselves, over a file of the package, and weigh each wave by what is found. Where training made the slow pairs long,
# the curve stays up; where the fast ones, it falls soon. In the picture a band holds the ripple, a line its mean.

# %%
package = EMBEDDED.parents[1]
text = (package / "rope.py").read_text(encoding="utf-8")
with torch.inference_mode():
    tokens = torch.tensor(llama.tokenizer.encode(text, bos=True, eos=False)[:512])
    x = block.attention_norm(llama.model.tok_embeddings(tokens[None]))
    keys = block.attention.wk(x).unflatten(-1, (-1, D // 2, 2))[0].double()  # (T, K, D/2, 2)
    weights = keys.square().sum(-1).mean((0, 1))  # (D/2,)
near = torch.arange(4 * TRAINED)
own = (torch.outer(near.double(), speeds).cos() * weights).sum(1) / weights.sum()
zero = first_zero(D, THETA, near)
dip = f"is first below zero at n = {zero:,}" if zero else f"is above zero up to n = {len(near):,}"
print(f"With {D // 2} pairs and θ = {THETA:,.0f}, g(n) {dip}.")
print(f"With the checkpoint's own keys the mean up to {TRAINED:,} is {own[:TRAINED].mean():.2f}, of 1 at n = 0.")


def band(axes, values, every, label):
    """The mean of each `every` distances as a line, and all of them as a band around it."""
    parts = values[: len(values) // every * every].view(-1, every)
    middles = (torch.arange(len(parts)) + 0.5) * every
    (line,) = axes.plot(middles, parts.mean(1), label=label)
    axes.fill_between(middles, parts.amin(1), parts.amax(1), color=line.get_color(), alpha=0.2, lw=0)
    axes.axhline(0, color="k", lw=0.8)
    return line.get_color()


with picture(options.out / "why-theta-4-expectation.png", 8.6, 3.2) as figure:
    left, right = figure.subplots(1, 2)
    for theta, zero in zeros.items():
        left.axvline(zero, lw=0.8, ls=":", color=band(left, g(128, theta, distances), 800, f"θ = {theta:,.0f}"))
    left.set(xlabel="distance n", ylabel="g(n), of 1 at n = 0", title="Dotted: the first dip below zero")
    band(right, g(D, THETA, near), TRAINED // 16, "all pairs alike")
    band(right, own, TRAINED // 16, "weighed by its own keys")
    right.axvline(TRAINED, color="k", lw=0.8, ls="--", label="trained length")
    right.set(xlabel="distance n", title=f"Our checkpoint, θ = {THETA:,.0f}")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
show("why-theta-4-expectation")

# %% [markdown]
# ## 5. Past the trained length
#
# Now read. The texts are the source files of this package, which the checkpoint was not trained on, joined folder by
# folder. Every token is scored with all that stands before it, and the losses are gathered in bins by place. Each bin
# holds the same texts, but other passages of them: so compare schemes in one bin rather than bins with each other.

# %%
BINS = max(5, round(4 * options.stretch))  # four of them within the trained length
LENGTH = BINS * (TRAINED // 4)
rooms = sorted(room for room in package.iterdir() if room.is_dir())
texts = []
for name, files in {"core": package.glob("*.py"), **{room.name: room.rglob("*.py") for room in rooms}}.items():
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(files))
    texts.append(File(name, text[: 8 * LENGTH]))  # more than is read; folders with less are passed over


def losses(prepare=None, **changed):
    """Nats a token in each bin, with what is changed about the rotation from outside; and which texts were read."""
    llama = Llama.build(max_seq_len=LENGTH, max_batch_size=1, **changed)
    if prepare:
        prepare(llama.model)
    found = loss_by_position(llama, texts, bins=BINS, documents=options.documents)
    return [part.nats_per_token.value for part in found.bins], found.documents


by_scheme = {}
by_scheme["as trained"], read = losses()
print(f"Read: {', '.join(read)}, {LENGTH:,} tokens of each.")

# %% [markdown]
# What can be done without training? The frequencies are made when the model is built, so they can be others than those
# it was trained with:
#
# - another θ: all hands but the first change their speed;
# - `linear`: every hand is slowed by the same factor, and no angle is new (arXiv 2306.15595);
# - `ntk`: θ is raised just so far that the slowest hand is slowed by that factor (arXiv 2309.00071, section 3.1);
# - `yarn`: fast hands are kept, slow ones are slowed, and attention is sharpened a little (the same, section 3.4).

# %%
OTHER = 1e6 if THETA < 1e5 else 1e4
factor = LENGTH / TRAINED
CHANGES = {
    f"θ = {OTHER:,.0f}": {"rope_theta": OTHER},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": factor}},
    "ntk": {"rope_scaling": {"rope_type": "ntk", "factor": factor}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": TRAINED}},
}
for name, changed in CHANGES.items():
    by_scheme[name], _ = losses(**changed)

# %% [markdown]
# Compare downwards: a column holds the same tokens in every row. The first row says what happens past the trained
# length when nothing is done. The left column says what a change costs where nothing was wrong: the weights were
# trained with other hands.


# %%
def within(values):
    return sum(values[:4]) / 4


def beyond(values):
    return sum(values[4:]) / len(values[4:])


cells = [(name, f"{within(v):.3f}", f"{beyond(v):.3f}", f"{v[-1]:.3f}") for name, v in by_scheme.items()]
print(render(("nats a token", f"up to {TRAINED:,}", "beyond", "last bin"), cells))
best = min(by_scheme, key=lambda name: beyond(by_scheme[name]))
as_trained, other = by_scheme["as trained"], by_scheme[f"θ = {OTHER:,.0f}"]
print(f"Beyond the trained length the loss is {beyond(as_trained) - within(as_trained):+.3f} nats from that within.")
print(f"The lowest there: {best}.")
print(f"Another θ, put in from outside, costs {within(other) - within(as_trained):+.3f} nats within.")

with picture(options.out / "why-theta-5-beyond.png", 7.4, 3.2) as figure:
    axes = figure.subplots()
    middles = [(i + 0.5) * TRAINED / 4 for i in range(BINS)]
    for name, values in by_scheme.items():
        axes.plot(middles, values, ".-", label=name)
    axes.axvline(TRAINED, color="k", lw=0.8, ls="--")
    axes.set(xlabel="place in the text, tokens", ylabel="nats a token", title="Dashed: the trained length")
    axes.legend(fontsize=8)
show("why-theta-5-beyond")

# %% [markdown]
# ## 6. Why angles want float64
#
# At place 100,000 the first hand has turned by 100,000 radians. float32 keeps about seven digits of that, so the angle
# is known to a few thousandths. bfloat16 keeps two or three digits: it can't even count the tokens. The published
# recipe has float32 angles.

# %%
W = default(128, 1e6, 0).inv_freq
W32 = 1 / 1e6 ** (torch.arange(0, 128, 2).float() / 128)
counted = len(torch.arange(100_000).bfloat16().unique())
print(f"Of 100,000 places bfloat16 can tell {counted:,} apart.")
RECIPES = {
    "positions in bfloat16": lambda p: torch.outer(p.bfloat16().float(), W32).cos(),
    "frequencies in bfloat16": lambda p: torch.outer(p.float(), W32.bfloat16().float()).cos(),
    "table in bfloat16": lambda p: torch.outer(p, W).cos().bfloat16(),
    "angles in float32": lambda p: torch.outer(p.float(), W32).cos(),
    "angles in float64, table in float32": lambda p: torch.outer(p, W).cos().float(),
}


def error(recipe, place):
    """The largest error of a cosine at the 1,024 places up to this one."""
    p = torch.arange(max(0, place - 1023), place + 1).double()
    return float((recipe(p).double() - torch.outer(p, W).cos()).abs().max())


columns = (4096, 16_384, 100_000, 1_048_576)
found = {name: [error(recipe, place) for place in columns] for name, recipe in RECIPES.items()}
cells = [(name, *(f"{value:.1e}" for value in values)) for name, values in found.items()]
print(render(("largest error of cos up to", *(f"{place:,}" for place in columns)), cells))
for value, expected in zip(found["angles in float32"], (2.6e-4, 1.2e-3, 7.1e-3), strict=False):
    assert abs(value - expected) < 0.05 * expected
assert max(found["angles in float64, table in float32"]) < 1e-7

# %% [markdown]
# The package computes angles in float64 and keeps float32 tables. What would mistakes cost? Two come about where a
# model is cast to bfloat16 as a whole, and both can be put into the checkpoint from outside.
#
# - Rounded frequencies: a scheme of one's own is a function with a name. The hands get other speeds, but they stay
#   hands, and a score still depends on the distance alone.
# - Rounded places: neighbours come to stand in one spot, and their order is lost.
#
# The table above can't tell the two apart. The model can.


# %%
def rounded(head_dim, theta, length):
    """The default frequencies, rounded to bfloat16."""
    return Spectrum(default(head_dim, theta, length).inv_freq.bfloat16().double())


def round_places(model):
    """Makes the model count its places in bfloat16."""
    exact = model.rotation

    def rotation(length):
        places = torch.arange(length).bfloat16().long().clamp(max=length - 1)
        return tuple(table[places] for table in exact(length))

    model.rotation = rotation


SPECTRA["rounded"] = rounded
mistakes = {"as they are": as_trained}
mistakes["frequencies rounded"], _ = losses(rope_scaling={"rope_type": "rounded"})
mistakes["places rounded"], _ = losses(prepare=round_places)
for name, values in mistakes.items():
    inside, outside = within(values) - within(as_trained), beyond(values) - beyond(as_trained)
    print(f"{name}: {inside:+.3f} nats within the trained length, {outside:+.3f} beyond it")
assert within(mistakes["places rounded"]) > within(mistakes["frequencies rounded"])

with picture(options.out / "why-theta-6-precision.png", 8.6, 3.2) as figure:
    left, right = figure.subplots(1, 2)
    powers = [2**power for power in range(6, 21)]
    for name, recipe in RECIPES.items():
        left.plot(powers, [error(recipe, place) for place in powers], label=name)
    left.set(
        xscale="log",
        yscale="log",
        ylim=(1e-9, 1e6),
        xlabel="place",
        ylabel="largest error of cos",
        title="Heads of 128 numbers",
    )
    left.legend(fontsize=6, loc="upper left", ncols=2)
    for name, values in mistakes.items():
        right.plot(middles, values, ".-", label=name)
    right.axvline(TRAINED, color="k", lw=0.8, ls="--")
    right.set(xlabel="place in the text, tokens", ylabel="nats a token", title="Our checkpoint")
    right.legend(fontsize=8)
show("why-theta-6-precision")

# %% [markdown]
# ## 7. So why a million?
#
# Back to the hands. A hand completes a turn within T tokens if its wavelength is at most T. Solved for the pair, that
# is a share of ln(T/2π) / ln(θ) of all pairs. Counted in a head with very many pairs, it comes out the same.


# %%
def share(theta, length):
    return math.log(length / (2 * math.pi)) / math.log(theta)


for name, theta, length in (("Llama 2", 1e4, 4096), ("Code Llama", 1e6, 16_384), ("Code Llama", 1e6, 100_000)):
    many = default(131_072, theta, length).inv_freq
    counted = float((2 * math.pi / many <= length).double().mean())
    print(f"{name}, θ = {theta:,.0f}: {share(theta, length):.3f} of its pairs turn within {length:,} tokens")
    assert abs(counted - share(theta, length)) < 1e-4

# %% [markdown]
# Llama 2 at its 4,096 tokens: 0.704. Code Llama at 100,000 tokens: 0.700. A text of 100,000 tokens with the new θ looks
# like one of 4,096 with the old: as many hands have gone round, as many are still on their first way.
#
# Turn the question round. Which θ makes the two shares equal?

# %%
wanted = (100_000 / (2 * math.pi)) ** (1 / share(1e4, 4096))
print(f"θ = {wanted:,.0f}: {wanted / 1e6:.2f} million.")
assert abs(share(wanted, 100_000) - share(1e4, 4096)) < 1e-12
assert 0.9e6 < wanted < 1e6

with picture(options.out / "why-theta-7-share.png", 7, 3.8) as figure:
    axes = figure.subplots()
    lengths = torch.logspace(2, 6, 100).tolist()
    for theta in zeros:
        axes.plot(lengths, [share(theta, length) for length in lengths], label=f"θ = {theta:,.0f}")
    axes.plot([4096, 100_000], [share(1e4, 4096), share(1e6, 100_000)], "ko--", lw=0.8)
    axes.annotate("Llama 2", (4096, share(1e4, 4096)), (4, -14), textcoords="offset points")
    axes.annotate("Code Llama", (100_000, share(1e6, 100_000)), (4, -14), textcoords="offset points")
    axes.set(xscale="log", ylim=(0, 1.2), xlabel="tokens", ylabel="share of pairs", title="Pairs that complete a turn")
    axes.legend()
show("why-theta-7-share")

# %% [markdown]
# A million, in round figures. The paper gives no such formula. Its reason is that a larger θ makes attention less
# biased towards what is near (section 2.4), as section 4 has drawn it: the first dip at 1,707 is less than half of
# Llama 2's 4,096, while that at 27,115 lies beyond the 16,384 tokens that Code Llama was fine-tuned on. The arithmetic
# of the hands comes out at the same number.
#
# That is a way to see it and no proof. Within the 16,384 tokens of its fine-tuning a share of 0.569 complete a turn, so
# at 100,000 some hands show Code Llama angles that it hasn't met. Whether a model bears them has to be measured.
#
# What a larger θ alone does not do is in the paper's table 18. A number stands in a long prompt, at its beginning or
# further on, and is asked for at its end.

# %%
PAPER = {
    "not fine-tuned, θ = 10,000 or 1,000,000": ("95/100/100", "0/0/0", "0/0/0", "0/0"),
    "fine-tuned, θ = 10,000": ("34/93/98", "0/1/59", "0/0/0", "0/0"),
    "fine-tuned, frequencies / 4": ("100/100/100", "100/99/99", "2/99/100", "0/0"),
    "fine-tuned, θ = 1,000,000": ("95/95/100", "100/95/100", "55/100/98", "3/86"),
}
cells = [(name, *values) for name, values in PAPER.items()]
print(render(("found, %, key at 0/0.2/0.4", "4k", "8k", "16k", "24k"), cells))
print("Code Llama 7B, arXiv 2308.12950, table 18. At 24k the key stood at 0 and 0.2.")

# %% [markdown]
# Raised without fine-tuning, θ left nothing to be found past the trained length. Fine-tuned with the old θ, the model
# found little but what stood near, and less than before at the length it had known. Both together worked, to the
# fine-tuned length and somewhat beyond. The hands have to be slow enough, and the weights have to learn them.
#
# Section 5 put another θ into our checkpoint, without training. The experiment with training, every scheme from the
# same start and at equal budget, is `codellama longcontext reproduce`: a small model need not agree with the paper in
# everything, and its page says where it doesn't. The schemes stand in `llama/rope.py`, one function each.
