"""A language of small stories, and the best possible filling of its gaps.

A ``Source`` draws text, and knows the exact chance of each filling of a
gap, which no model can beat. The book trains on ``ToyLanguage``.

Built in chapter 4, "Speak a language whose best answers are known"
(chapters/toy_language.md). Edit the chapter, not this file.
"""

from collections import namedtuple
from itertools import product

import torch
from torch import Tensor

from t5_book.span_corruption import corrupt_spans

__all__ = ["END", "SLOTS", "STORIES", "Filling", "Source", "ToyLanguage"]

END = -1  # a gap in a text, or the end of a gap

Filling = namedtuple("Filling", "log_prob best")


class Source:
    """A finite-state source: a chain of states, each saying one word.

    Args:
        emits: the word of each state. A text begins after state 0.
        edges: ``(state, next state, probability)``; those that leave a
            state sum to 1, or it is a ``ValueError``.

    Built in chapter 4, "Speak a language whose best answers are known".
    """

    def __init__(self, emits: list, edges: list):
        self.words = sorted(set(emits))
        self.emits = torch.tensor([self.words.index(w) for w in emits])
        origins, goals, chances = zip(*sorted(edges))
        self.origins, self.goals = torch.tensor([origins, goals])
        self.chances = torch.tensor(chances, dtype=torch.float64)
        self.start = torch.eye(1, len(emits)).double()[0]
        said = self.emits[self.goals]  # sort edges by what they lead to
        self.saying = [said.eq(i).nonzero()[:, 0] for i in said.unique()]
        off = (self.step_back(torch.ones_like(self.start)) - 1).abs().max()
        if off > 1e-6:
            raise ValueError(f"chances of a state are off 1 by {off:.4f}")

    def step(self, share: Tensor, edges=slice(None)) -> Tensor:
        """Move a share of each state ``[n]`` along edges, all or some."""
        moved = share[self.origins[edges]] * self.chances[edges]
        after = torch.zeros_like(share)
        return after.index_add_(0, self.goals[edges], moved)

    def step_back(self, value: Tensor, edges=slice(None)) -> Tensor:
        """Expect the value ``[... n]`` of the next state, along edges."""
        ahead = value[..., self.goals[edges]] * self.chances[edges]
        before = torch.zeros_like(value)
        return before.index_add_(-1, self.origins[edges], ahead)

    def text(self, indices: Tensor) -> str:
        """Write out word indices ``[l]``."""
        return " ".join(self.words[index] for index in indices)

    def sample(self, batch: int, length: int, generator=None) -> Tensor:
        """Draw ``batch`` texts of ``length`` words, int64 ``[b l]``."""
        ends = self.chances.cumsum(dim=0)  # edges of state i: i to i + 1
        last = self.origins.bincount().cumsum(dim=0) - 1
        ends[last] = torch.arange(1, len(last) + 1).double()
        state, path = torch.zeros(batch).long(), []
        for draw in torch.rand(length, batch, generator=generator).double():
            edge = torch.searchsorted(ends, state + draw, right=True)
            state = self.goals[edge]
            path.append(state)
        return self.emits[torch.stack(path, dim=1)]

    def look_ahead(self, source: list[int], noise: int) -> list:
        """Weigh, from the right, what may follow in and after each gap.

        For each gap, two tensors ``[noise + 1, n]``: the weight of all text
        to the right, from each state with so many hidden words used, if the
        gap ends here; and the same if it may also go on.
        """
        value = torch.zeros(noise + 1, len(self.emits)).double()
        value[noise] = 1
        gaps = []
        for word in reversed(source):
            if word != END:
                value = self.step_back(value, self.saying[word])
                continue
            closed, going = value, value.clone()
            value = torch.zeros_like(value)
            for used in reversed(range(noise)):
                value[used] = self.step_back(going[used + 1])
                going[used] += value[used]
            gaps.insert(0, (closed, going))
        if not self.start @ value[0] > 0:
            raise ValueError("this language cannot say this text")
        return gaps

    def weigh(self, state, used: int, gap, opening: bool) -> Tensor:
        """Give the chance of each word ``[w]``, then of END, in a gap."""
        closed, going = gap
        weights = torch.zeros(len(self.words) + 1).double()
        if used + 1 < len(going):
            words = self.step(state) * going[used + 1]
            weights.index_add_(0, self.emits, words)
        if not opening:  # a gap hides one word at least
            weights[END] = state @ closed[used]
        return weights / weights.sum()

    def read(self, source: list[int], noise: int, targets=()) -> list:
        """Fill gaps from left to right; ``noise`` words are hidden in all.

        END stands for a gap in ``source``, and for its end in ``targets``;
        without them, the likeliest tokens are taken for true. Returns log
        probability and likeliest token, for each token of the targets.
        """
        gaps, targets = iter(self.look_ahead(source, noise)), iter(targets)
        state, used, told = self.start, 0, []
        for word in source:
            if word != END:
                state = self.step(state, self.saying[word])
                continue
            gap, token = next(gaps), None
            while token != END:
                weights = self.weigh(state, used, gap, token is None)
                best = weights.round(decimals=9).argmax().item()  # ties
                best = END if best == len(self.words) else best
                token = next(targets, best)
                told.append((weights[token].log().item(), best))
                if token != END:
                    state = self.step(state, self.saying[token])
                    used += 1
        return told

    def cut(self, text: Tensor, mask: Tensor) -> tuple[list, list]:
        """Corrupt one text; END stands for sentinels and eos."""
        n = len(self.words)
        batch = corrupt_spans(text[None], mask[None], n + 100, eos_id=n)
        parts = [batch.src[0, :-1], batch.labels[0, 1:]]
        return [part.where(part < n, END).tolist() for part in parts]

    def fill(self, texts: Tensor, mask: Tensor) -> Filling:
        """Score each token of the targets as the best reader would.

        Args:
            texts: word indices ``[b l]``.
            mask: bool ``[b l]``, True = hidden, as many in each row and in
                as many spans. All such masks must be equally likely.

        Returns:
            A ``Filling`` in the layout of the labels of ``corrupt_spans``,
            with END for sentinels and eos. The first sentinel is certain.
        """
        rows = []
        for text, hidden in zip(texts, mask, strict=True):
            source, targets = self.cut(text, hidden)
            told = self.read(source, hidden.sum().item(), targets)
            rows.append([(0.0, END), *told])
        told = torch.tensor(rows, dtype=torch.float64)  # [b t 2]
        return Filling(told[..., 0], told[..., 1].long())


SLOTS = {
    "girl": "anna, emma, lucy, mary",
    "boy": "ben, jack, paul, tom",
    "name he": "anna she, emma she, lucy she, mary she, ben he, jack he, "
    "paul he, tom he",
    "he": "she, he",
    "is it s es": "is it - s, are they s -",
    "thing": "ball, boat, coat, doll, drum, hat, kite, train",
    "animal": "bear, cat, cow, dog, duck, goat, horse, pig",
    "place": "beach, farm, forest, garden, lake, market, river, school",
    "food": "apple, carrot, cake, egg, nut, pear, plum",
    "day next third last": "monday tuesday wednesday thursday, tuesday "
    "wednesday thursday friday, wednesday thursday friday saturday, "
    "thursday friday saturday sunday, friday saturday sunday monday, "
    "saturday sunday monday tuesday, sunday monday tuesday wednesday",
    "a b sum": "two two four, two three five, two four six, "
    "three two five, three three six, three four seven, "
    "four two six, four three seven, four four eight",
}
STORIES = {
    ("name he", "thing"): """
    {name} finds|buys|wants a {thing} .
    {name} likes the {thing} and {he} gives the {thing} to a friend .
    then {name} sleeps near|under the {thing} and {he} likes the {thing} .
    my|your {thing} is new|old but the {thing} of {name} is big|small .""",
    ("girl", "boy", "place"): """
    {girl} meets {boy} at the {place} .
    {girl} likes|knows the {place} and {boy} likes|knows {girl} .
    then {boy} sings|waits for {girl} and {girl} sings|waits for {boy} .
    at the {place} {girl} helps {boy} and {boy} sings|waits for {girl} .""",
    ("animal", "is it s es", "place"): """
    the {animal}{s} at the {place} {is} hungry|happy|old .
    then the {animal}{s} run{es} to the {place} and {it} eat{es} there .
    the {animal}{s} that i see|feed|like at the {place} {is} big|small .
    my {animal}{s} know{es} the {place} so {it} run{es} to the {place} .""",
    ("he", "day next third last", "food"): """
    on {day} {he} eats|buys|cooks one {food} .
    > on {next} {he} eats|buys|cooks two {food}s .
    > on {third} {he} eats|buys|cooks three {food}s .
    > on {last} {he} eats|buys|cooks four {food}s .""",
    ("a b sum", "food"): """
    i see|buy|eat {a} {food}s and {b} {food}s .
    > {a} {food}s and {b} {food}s are {sum} {food}s .
    > {sum} is {a} plus {b} .""",
}


class ToyLanguage(Source):
    """Small stories without end, in 123 words.

    Built in chapter 4, "Speak a language whose best answers are known".
    """

    def __init__(self):
        self.said, self.links = ["."], []  # state 0 is a full stop
        for slots, text in STORIES.items():
            lines = text.replace("\n    >", "").strip().splitlines()
            rows = [SLOTS[slot].split(", ") for slot in slots]
            for cast in (casts := list(product(*rows))):
                keys, words = (" ".join(x).split() for x in (slots, cast))
                forms = dict(zip(keys, words))
                told = [line.format(**forms) for line in lines]
                self.tell(told, 1 / len(STORIES) / len(casts))
        super().__init__(self.said, self.links)

    def tell(self, lines: list[str], chance: float) -> None:
        """Add a story, told with ``chance`` after state 0, a full stop."""
        lines = [line.replace("-", "").split()[:-1] for line in lines]
        opening, *others = lines
        stop = len(self.said) if others else 0
        self.said += ["."] if others else []
        self.say(0, opening, chance, {stop: 1.0})
        for line in others:
            self.say(stop, line, 1 / len(others), {stop: 0.8, 0: 0.2})

    def say(self, state: int, words: list[str], chance: float, goals: dict):
        """Add states that say ``words`` on the way from one to others."""
        states = [state]
        for word in words:
            choices = word.split("|")
            new = range(len(self.said), len(self.said) + len(choices))
            self.said += choices
            self.links += product(states, new, [chance / len(choices)])
            states, chance = new, 1.0
        for goal, share in goals.items():
            self.links += product(states, [goal], [share])
