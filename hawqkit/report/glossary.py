"""The report's terms in plain words."""

from __future__ import annotations

from hawqkit.report.nouns import TEXT, Nouns

_TEXT = """
KL divergence: How far the compressed model's predictions are from the original's. For every token
of a text both models give a probability to each possible next token; the KL divergence of the
two, averaged over tokens, is 0 if they always agree and grows as they part. At 0.1 nats the
probability of what the original expects has fallen by about 10 % (geometric mean).

Nat: The unit of KL divergence and of loss: natural logarithms. 1 nat = 1.44 bits.

Format: How a layer's weights are stored. int4-g64 is whole numbers of 4 bits, with one scale for
every 64 weights of a row; -asym adds a zero point; none keeps the weights as they were.

Average bits: Bits of a weight's code, averaged over all weights of the selected layers; scales
and zero points are not counted.

Bits per weight: The same with scales, zero points and padding: what is really stored.

Size: Bytes of all files that an export target writes, with embeddings, configuration and
tokenizer. MB are 10⁶ bytes.

Baseline: Another way to choose formats within the same budget. uniform: every layer alike. ends:
the first and last blocks at 8 bit, one width elsewhere. weight-error: least squared change of the
weights. hawq-v2: average Hessian trace times squared change of the weights.

Standard error (±): How much a figure would scatter if the measurement were repeated on other text
of the same kind. About two thirds of repetitions fall within one standard error, 95 % within two.

Paired difference: The difference of two mixes, taken sequence by sequence on the same text. What
is hard for both cancels, so it is known better than either of the two figures.

Score: The predicted KL divergence if one layer alone were stored in one format. The sum of the
scores of a mix is what the choice makes small.

Predicted KL: What sequences that took no part in choosing say about the chosen mix: the sum over
layers of half the curvature along each layer's rounding error (second order).

Interactions: What the layers' errors do together beyond the sum of each alone: the joint
prediction minus the sum.

Linear logits: The KL divergence if the outputs before the softmax moved in proportion to the
errors of all layers at once, the softmax itself being exact. What lies between it and second order
is the softmax's; what lies between it and the measurement on the same data is the network's, which
is not linear in its weights. On a parabola: the same with outputs on the parabola through those at
a quarter of the errors to either side.

Spread: How far, relatively, the KL divergence of a mix would scatter if its rounding errors were
random: √(2 / participation ratio of the whole network).

Confidence of a limit on the KL: How sure the KL divergence is to stay below the limit, over the
luck of rounding (spread) and of the sequences that predict (standard error). At 0.5 the
prediction itself is limited.

Risk: How many standard deviations are added to every score before the choice, so that layers whose
loss is least certain get more bits.

Trace: Sum of the curvatures of a layer's block of the Fisher matrix: how strongly predictions
react when all its weights are jiggled at random.

Participation ratio: Over how many directions a layer's curvature is spread: tr(G)² / |G|_F². A
layer of low ratio and high trace is a risky bet, because an error may hit a steep direction or
miss it.

Spectrum, eigenvalue: The curvature of the loss along its principal directions, the eigenvectors;
λ_max is the steepest. A step of length t along an eigenvector changes the loss by ½ λ t².

Gauss-Newton matrix: The part of the Hessian (second derivatives of the loss) that stays when the
outputs are taken as linear in the weights. For a softmax it is the Fisher matrix, and half its
quadratic form is the KL divergence to second order; it has no negative eigenvalues.

Noise floor: The eigenvalue that rounding alone can feign in this model's products. What lies below
it cannot be told from zero.

Rank and degeneracy: The numerical rank counts the eigenvalues of a layer's curvature that are at
least eps in magnitude; the degeneracy is the share of all others: directions along which the
weights may move without effect. Stable rank, tr / λ₁, participation ratio and entropy rank are
other numbers that are called rank; they can differ by a factor of 100, so that each is named.

Frontier, proven bound: The least predicted loss at every size. The bound is proven: no mix of
these formats has a smaller sum of scores at that size.

Stability: The probe's sequences are resampled and the choice is made again, many times: in what
share of these a layer keeps its format.

Same top-1: Share of predictions in which the most likely next token stays the same.

Perplexity: exp(loss): among how many equally likely tokens the model seems to hesitate. Lower is
better; it depends on the text and its tokens.

Calibration and held-out text: Calibration text is what sensitivities are measured on. Held-out
text is never seen by the choice; only it can tell how good the choice is.

Gradient-equivalent: The cost of one plain forward and backward pass over one micro-batch.
"""


# In place of the terms above where each example has one label; empty: the term does not occur.
_OF_CLASSES = """
KL divergence: How far the compressed model's predictions are from the original's. For each {one}
both models give a probability to every class; the KL divergence of the two, averaged over {many},
is 0 if they always agree and grows as they part. At 0.1 nats the probability of what the original
expects has fallen by about 10 % (geometric mean).

Size: Bytes of all files that an export target writes. MB are 10⁶ bytes.

Standard error (±): How much a figure would scatter if the measurement were repeated on other {many}
of the same kind. About two thirds of repetitions fall within one standard error, 95 % within two.

Paired difference: The difference of two mixes, taken {one} by {one}. What is hard for both cancels,
so it is known better than either of the two figures.

Predicted KL: What {many} that took no part in choosing say about the chosen mix: the sum over
layers of half the curvature along each layer's rounding error (second order).

Confidence of a limit on the KL: How sure the KL divergence is to stay below the limit, over the
luck of rounding (spread) and of the {many} that predict (standard error). At 0.5 the prediction
itself is limited.

Stability: The probe's {many} are resampled and the choice is made again, many times: in what share
of these a layer keeps its format.

Same top-1: Share of {many} whose most likely class stays the same.

Perplexity:

Calibration and held-out text: Calibration {many} are what sensitivities are measured on. Held-out
{many} are never seen by the choice; only they can tell how good the choice is.
"""

_MORE_OF_CLASSES = """
Accuracy: Share of {many} whose most likely class is the true one. Its error is the binomial's,
√(a (1 − a) / n); the 95 % interval is Wilson's, which also holds near 0 % and 100 %.

Flip: One of the {many} whose most likely class the compressed model changes. A flip may turn right
into wrong, wrong into right, or one wrong class into another. Accuracy counts only the balance of
the first two; flips count all of them.

Confusion: How many {many} of each true class are taken for each class.

Distribution shift: Held-out {many} may come from elsewhere than the calibration {many}, or be ones
that the model has not learned by heart. The original's loss on both shows that, compression aside.
"""


def glossary(nouns: Nouns = TEXT) -> tuple[tuple[str, str], ...]:
    """Return (term, words) for one kind of data.

    >>> [term for term, _ in glossary() if "text" in term], len(glossary())
    (['Calibration and held-out text'], 28)
    """
    if not nouns.classes:
        return _parse(_TEXT)
    words = {"one": nouns.one, "many": nouns.many}
    other = dict(_parse(_OF_CLASSES.format(**words)))
    terms = [(term, other.get(term, about)) for term, about in _parse(_TEXT)]
    terms = [(term, about) for term, about in terms if about]
    *rest, (_, held_out), last = terms
    name = f"Calibration and held-out {nouns.many}"
    return (*rest, *_parse(_MORE_OF_CLASSES.format(**words)), (name, held_out), last)


def _parse(text: str) -> tuple[tuple[str, str], ...]:
    """Return (term, words) of paragraphs that begin with `term: `."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))
    terms = (paragraph.partition(":") for paragraph in paragraphs)
    return tuple((term, words.strip()) for term, _, words in terms)
