"""A language of small stories, and the best possible filling of its gaps.

A ``MarkovSource`` draws text, and knows the exact probability of each
filling of a gap, which no model can beat. The book trains on ``ToyLanguage``.

Built in chapter 4, "A toy language whose best answers are known"
(chapters/toy_language.md). Edit the chapter, not this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from t5_book.span_corruption import corrupt_spans

__all__ = ["ToyLanguage"]

GAP = -2  # in a text that is shown: one or more words are hidden here
END = -1  # in an answer: the gap ends here


class Ahead(NamedTuple):
    """What may follow in a gap, and behind it.

    Both are ``[u n]``: for each number of hidden words used up, each state.
    """

    inside: Tensor  # gamma: the gap may go on, or end
    behind: Tensor  # beta: the gap has ended


class Filling(NamedTuple):
    """What the best reader says to each token of the labels, ``[b t]``."""

    log_prob: Tensor  # of the true token, float64, in nats
    best: Tensor  # the likeliest token, int64: a word index, or END


class MarkovSource:
    """A hidden Markov model that draws text and fills gaps in it.

    Args:
        emits: the word that each state says. A text begins after state 0.
        edges: ``(state, next state, probability)``; the probabilities of
            the edges that leave a state sum to 1.

    Raises:
        ValueError: if an edge leads nowhere, or if the probabilities of a
            state are negative or do not sum to 1.

    Source: Rabiner 1989.
    """

    def __init__(self, emits: Sequence[str], edges: Sequence[tuple[int, int, float]]):
        _check_edges(emits, edges)
        self.words = sorted(set(emits))
        index = {word: i for i, word in enumerate(self.words)}
        self.emits = torch.tensor([index[word] for word in emits])  # [n]

        edges = sorted(edges)  # by origin
        self.origins = torch.tensor([origin for origin, _, _ in edges])  # [e]
        self.goals = torch.tensor([goal for _, goal, _ in edges])  # [e]
        self.chances = torch.tensor(
            [chance for _, _, chance in edges], dtype=torch.float64
        )  # [e]
        self.start = torch.zeros(len(emits), dtype=torch.float64)  # [n]
        self.start[0] = 1

        # an entry for every word, also for one that no edge leads to
        goal_words = self.emits[self.goals]  # [e], what is said at the end of each edge
        self.edges_to = [
            (goal_words == word).nonzero()[:, 0] for word in range(len(self.words))
        ]

    def step(self, alpha: Tensor, word: int | None = None) -> Tensor:
        """Move the weight of each state, ``[n]``, one word on: ``alpha P``.

        With ``word``, only to states that say this word (an index).
        """
        edges = slice(None) if word is None else self.edges_to[word]
        moved = alpha[self.origins[edges]] * self.chances[edges]  # [e]
        after = torch.zeros_like(alpha)
        return after.index_add_(0, self.goals[edges], moved)

    def step_back(self, beta: Tensor, word: int | None = None) -> Tensor:
        """Expect the value ``[... n]`` of the next state: ``P beta``.

        With ``word``, only over next states that say this word (an index).
        """
        edges = slice(None) if word is None else self.edges_to[word]
        ahead = beta[..., self.goals[edges]] * self.chances[edges]  # [... e]
        before = torch.zeros_like(beta)
        return before.index_add_(-1, self.origins[edges], ahead)

    def sample(
        self, batch: int, length: int, generator: Generator | None = None
    ) -> Tensor:
        """Draw texts, int64 ``[b l]``: indices of ``words``.

        Args:
            batch: number of texts ``b``.
            length: words in each, ``l``.
            generator: of random numbers, on the CPU; default torch's own.
        """
        ends = self.chances.cumsum(dim=0)  # [e], where the share of each edge ends
        # the last share of state i ends at i + 1 exactly, whatever was rounded
        last = self.origins.bincount().cumsum(dim=0) - 1  # [n]
        ends[last] = torch.arange(1, len(last) + 1, dtype=torch.float64)

        state = torch.zeros(batch, dtype=torch.long)  # [b]
        words = []
        for draw in torch.rand(length, batch, generator=generator).double():
            edge = torch.searchsorted(ends, state + draw, right=True)  # [b]
            state = self.goals[edge]
            words.append(self.emits[state])
        return torch.stack(words, dim=1)  # [b l]

    def text(self, indices: Tensor) -> str:
        """Write out word indices ``[l]``."""
        return " ".join(self.words[index] for index in indices)

    def look_ahead(self, shown: list[int], hidden: int) -> list[Ahead]:
        """Weigh, for each gap, what may follow in it and after it.

        Args:
            shown: word indices, with GAP where words are hidden.
            hidden: how many words are hidden in all.

        Raises:
            ValueError: if the language cannot say such a text.
        """
        beta = torch.zeros(hidden + 1, len(self.emits), dtype=torch.float64)  # [u n]
        beta[hidden] = 1
        gaps = []
        for word in reversed(shown):
            if word != GAP:
                beta = self.step_back(beta, word)
                continue
            behind = beta
            inside = behind.clone()
            beta = torch.zeros_like(behind)
            # one more hidden word, then what may follow inside
            for used in reversed(range(hidden)):
                beta[used] = self.step_back(inside[used + 1])
                inside[used] += beta[used]
            gaps.append(Ahead(inside, behind))
        if not self.start @ beta[0] > 0:
            words = ["____" if word == GAP else self.words[word] for word in shown]
            raise ValueError(
                f"this language cannot say a text with {hidden} words hidden in the "
                f"gaps (____) of: {' '.join(words)}"
            )
        return gaps[::-1]

    def next_in_gap(
        self, alpha: Tensor, ahead: Ahead, used: int, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Find how probable each word is in a gap, and how probable its end.

        Args:
            alpha: weight of each state, ``[n]``, given all that was read.
            ahead: what may follow, from ``look_ahead``.
            used: hidden words used up so far.
            first: whether this is the first word of the gap.

        Returns:
            The probability of each word ``[w]``, and that of the end.
        """
        words = torch.zeros(len(self.words), dtype=torch.float64)
        if used + 1 < len(ahead.inside):
            goals = self.step(alpha) * ahead.inside[used + 1]  # [n]
            words.index_add_(0, self.emits, goals)
        end = alpha @ ahead.behind[used]
        if first:  # a gap hides at least one word
            end = torch.zeros_like(end)
        total = words.sum() + end
        return words / total, end / total

    def read(
        self, shown: list[int], hidden: int, answer: list[int] | None = None
    ) -> list[tuple[float, int]]:
        """Fill gaps from left to right, as the best reader would.

        Args:
            shown: word indices, with GAP where words are hidden.
            hidden: how many words are hidden in all.
            answer: the true words of all gaps, with END after each gap; by
                default the likeliest token is taken for true each time.

        Returns:
            For each token of the answer its log probability, in nats, and the
            likeliest token: a word index, or END.

        Raises:
            ValueError: if the language cannot say such a text.
        """
        gaps = iter(self.look_ahead(shown, int(hidden)))
        alpha = self.start  # [n]
        used = 0
        tokens = []
        for word in shown:
            if word != GAP:
                alpha = self.step(alpha, word)
                continue
            ahead = next(gaps)
            first = True
            token = None
            while token != END:
                chances, end = self.next_in_gap(alpha, ahead, used, first)
                # of equals take the first: sums may differ in their last digits
                rounded = chances.round(decimals=9)
                best = rounded.argmax().item()
                if end.round(decimals=9) > rounded[best]:
                    best = END
                token = best if answer is None else answer[len(tokens)]
                chance = end if token == END else chances[token]
                if not chance > 0:
                    word = (
                        "the end of the gap"
                        if token == END
                        else repr(self.words[token])
                    )
                    raise ValueError(
                        f"token {len(tokens)} of the answer is {word}, which this "
                        "language cannot say there"
                    )
                tokens.append((chance.log().item(), best))
                first = False
                if token != END:
                    alpha = self.step(alpha, token)
                    used += 1
        return tokens

    def cut(self, text: Tensor, mask: Tensor) -> tuple[list[int], list[int]]:
        """Corrupt one text ``[l]``, hidden where ``mask [l]`` is True.

        Returns what is shown, with GAP for each span, and the answer, with END
        after each span.
        """
        # word indices end below eos, and the sentinels begin above it
        eos = len(self.words)
        batch = corrupt_spans(
            text[None],
            mask[None],
            first_sentinel=eos + len(text),
            eos_id=eos,
            num_sentinels=len(text),
        )
        source, labels = batch.src[0].tolist(), batch.labels[0].tolist()
        shown = [token if token < eos else GAP for token in source[:-1]]
        answer = [token if token < eos else END for token in labels[1:]]
        return shown, answer

    def fill(self, texts: Tensor, mask: Tensor) -> Filling:
        """Score each token of the labels as the best reader would.

        All masks with as many hidden words and spans must be equally likely, as
        those of ``random_spans_noise_mask`` are. A text of 64 words takes about
        0.03 s on one core, a text of 500 words about 4 s.

        Args:
            texts: word indices ``[b l]``.
            mask: bool ``[b l]``, True = hidden; in each row as many words, in
                as many spans.

        Returns:
            A ``Filling`` in the layout of the labels of ``corrupt_spans``, with
            END for sentinels and eos. The first sentinel is certain.

        Raises:
            TypeError: if texts are not integers or the mask is not boolean.
            ValueError: if shapes differ, if rows differ in their hidden words or
                spans, or if the language cannot say a text.
        """
        if texts.shape != mask.shape or texts.ndim != 2:
            raise ValueError(
                f"texts have shape {tuple(texts.shape)} and the mask "
                f"{tuple(mask.shape)}; pass two of shape (batch, length)"
            )
        rows = []
        for text, hidden in zip(texts, mask):
            shown, answer = self.cut(text, hidden)
            rows.append([(0.0, END), *self.read(shown, int(hidden.sum()), answer)])
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ValueError(
                f"labels have {lengths[0]} to {lengths[-1]} tokens; hide as many "
                "words, in as many spans, in each row"
            )
        return Filling(
            torch.tensor([[p for p, _ in row] for row in rows], dtype=torch.float64),
            torch.tensor([[best for _, best in row] for row in rows]),
        )


def _check_edges(emits, edges):
    """Refuse edges that lead nowhere, and probabilities that are none."""
    leaving = [0.0] * len(emits)
    for origin, goal, chance in edges:
        if not (0 <= origin < len(emits) and 0 <= goal < len(emits)):
            raise ValueError(
                f"an edge goes from state {origin} to {goal}, but the states are "
                f"0 to {len(emits) - 1}"
            )
        if not chance >= 0:
            raise ValueError(
                f"the edge from {origin} to {goal} has probability {chance}"
            )
        leaving[origin] += chance
    for state, total in enumerate(leaving):
        if not abs(total - 1) < 1e-6:
            raise ValueError(
                f"the probabilities that leave state {state}, {emits[state]!r}, "
                f"sum to {total:.4f}; make them 1"
            )


GIRLS = ["anna", "emma", "lucy", "mary"]
BOYS = ["ben", "jack", "paul", "tom"]
THINGS = ["ball", "boat", "coat", "doll", "drum", "hat", "kite", "train"]
ANIMALS = ["bear", "cat", "cow", "dog", "duck", "goat", "horse", "pig"]
PLACES = [
    "beach",
    "farm",
    "forest",
    "garden",
    "lake",
    "market",
    "river",
    "school",
]
FOODS = ["apple", "carrot", "cake", "egg", "nut", "pear", "plum"]
DAYS = [
    "monday",
    "tuesday",
    "wednesday",
    "thursday",
    "friday",
    "saturday",
    "sunday",
]
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
]

# What a story remembers: each choice gives words to the fields of its sentences.
GIRL = [{"girl": name} for name in GIRLS]
BOY = [{"boy": name} for name in BOYS]
THING = [{"thing": word} for word in THINGS]
ANIMAL = [{"animal": word} for word in ANIMALS]
PLACE = [{"place": word} for word in PLACES]
FOOD = [{"food": word} for word in FOODS]
PRONOUN = [{"he": "she"}, {"he": "he"}]
PERSON = [{"name": name, "he": "she"} for name in GIRLS] + [
    {"name": name, "he": "he"} for name in BOYS
]
# "the bear runs", "the bears run": one of the two has an s
ONE_OR_MANY = [
    {"is": "is", "it": "it", "noun_s": "", "verb_s": "s"},
    {"is": "are", "it": "they", "noun_s": "s", "verb_s": ""},
]
FOUR_DAYS = [
    {
        "day": DAYS[i],
        "next": DAYS[(i + 1) % 7],
        "third": DAYS[(i + 2) % 7],
        "last": DAYS[(i + 3) % 7],
    }
    for i in range(7)
]
SUM = [
    {"a": NUMBERS[a], "b": NUMBERS[b], "sum": NUMBERS[a + b]}
    for a in (2, 3, 4)
    for b in (2, 3, 4)
]
CHOICES = {
    "FINDS": ["finds", "buys", "wants"],
    "COOKS": ["eats", "buys", "cooks"],
    "LIKES": ["likes", "knows"],
    "SINGS": ["sings", "waits"],
    "SEE": ["see", "buy", "eat"],
    "FEED": ["see", "feed", "like"],
    "NEAR": ["near", "under"],
    "MY": ["my", "your"],
    "NEW": ["new", "old"],
    "BIG": ["big", "small"],
    "HUNGRY": ["hungry", "happy", "old"],
}


@dataclass(frozen=True)
class Story:
    """A story of the toy language.

    Args:
        remembers: lists of choices; of each list one choice is drawn, and
            holds for the whole story. A choice gives a word to each field,
            such as ``{"name": "anna", "he": "she"}``.
        opening: sentences that come first, in this order.
        more: sentences that may follow, in any order and number; default none.

    Sentences are words between spaces, without the full stop. ``{name}``
    stands for the word of that field, and a word of ``CHOICES``, such as
    ``BIG``, for one of its words, drawn anew each time.
    """

    remembers: Sequence[Sequence[dict[str, str]]]
    opening: Sequence[str]
    more: Sequence[str] = ()


STORIES = [
    Story(
        remembers=[PERSON, THING],
        opening=["{name} FINDS a {thing}"],
        more=[
            "{name} likes the {thing} and {he} gives the {thing} to a friend",
            "then {name} sleeps NEAR the {thing} and {he} likes the {thing}",
            "MY {thing} is NEW but the {thing} of {name} is BIG",
        ],
    ),
    Story(
        remembers=[GIRL, BOY, PLACE],
        opening=["{girl} meets {boy} at the {place}"],
        more=[
            "{girl} LIKES the {place} and {boy} LIKES {girl}",
            "then {boy} SINGS for {girl} and {girl} SINGS for {boy}",
            "at the {place} {girl} helps {boy} and {boy} SINGS for {girl}",
        ],
    ),
    Story(
        remembers=[ANIMAL, ONE_OR_MANY, PLACE],
        opening=["the {animal}{noun_s} at the {place} {is} HUNGRY"],
        more=[
            "then the {animal}{noun_s} run{verb_s} to the {place} "
            "and {it} eat{verb_s} there",
            "the {animal}{noun_s} that i FEED at the {place} {is} BIG",
            "my {animal}{noun_s} know{verb_s} the {place} "
            "so {it} run{verb_s} to the {place}",
        ],
    ),
    Story(
        remembers=[PRONOUN, FOUR_DAYS, FOOD],
        opening=[
            "on {day} {he} COOKS one {food}",
            "on {next} {he} COOKS two {food}s",
            "on {third} {he} COOKS three {food}s",
            "on {last} {he} COOKS four {food}s",
        ],
    ),
    Story(
        remembers=[SUM, FOOD],
        opening=[
            "i SEE {a} {food}s and {b} {food}s",
            "{a} {food}s and {b} {food}s are {sum} {food}s",
            "{sum} is {a} plus {b}",
        ],
    ),
]


class _Chain:
    """States and edges in the making."""

    def __init__(self):
        self.emits = ["."]  # state 0, the full stop between stories
        self.edges = []

    def add_state(self, word: str) -> int:
        """Add a state that says ``word``; return its number."""
        self.emits.append(word)
        return len(self.emits) - 1

    def connect(self, origins: list[int], goal: int, chance: float) -> None:
        """Lead from all ``origins`` to ``goal``."""
        for origin in origins:
            self.edges.append((origin, goal, chance))

    def add_words(
        self, origin: int, text: str, memory: dict[str, str], chance: float
    ) -> list[int]:
        """Say ``text`` after state ``origin``, with a probability ``chance``.

        Returns the states of its last word.
        """
        before = [origin]
        for word in text.split():
            words = CHOICES.get(word, [word.format(**memory)])
            states = [self.add_state(alternative) for alternative in words]
            for state in states:
                self.connect(before, state, chance / len(words))
            before, chance = states, 1.0
        return before

    def add_copy(self, story: Story, memory: dict[str, str], chance: float) -> None:
        """Tell ``story`` after state 0, with a probability ``chance``."""
        opening = " . ".join(story.opening)
        if not story.more:
            last = self.add_words(0, opening, memory, chance)
            self.connect(last, 0, 1.0)
            return
        stop = self.add_state(".")
        last = self.add_words(0, opening, memory, chance)
        self.connect(last, stop, 1.0)
        for sentence in story.more:
            last = self.add_words(stop, sentence, memory, 1 / len(story.more))
            self.connect(last, stop, 0.8)
            self.connect(last, 0, 0.2)  # the story ends


class ToyLanguage(MarkovSource):
    """Small stories without end, in 123 words.

    Args:
        stories: what to tell, all equally likely; default ``STORIES``.
    """

    def __init__(self, stories: Sequence[Story] = STORIES):
        chain = _Chain()
        for story in stories:
            copies = list(product(*story.remembers))
            for choices in copies:
                memory = {}
                for choice in choices:
                    memory |= choice
                chain.add_copy(story, memory, 1 / len(stories) / len(copies))
        super().__init__(chain.emits, chain.edges)
