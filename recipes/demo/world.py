"""A small invented world in templated English: the text that the demo model learns from.

Everything is made here, from a seed; no text of anybody else's is used. The facts (towns, their rivers, crafts,
colours, mayors) are told in prose, asked in chats, and mixed with arithmetic, counting and little stories.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

TOWNS = (
    "Velmora", "Tarnwick", "Osbury", "Kelheim", "Brindle Bay", "Narrow Ford", "Quillon", "Sedgemoor", "Ashgrove",
    "Fenmark", "Luthen", "Pellworth", "Rookhaven", "Dunmere", "Ivory Hill", "Jasperton", "Calder Vale", "Emberlin",
    "Gorsey", "Wexley",
)  # fmt: skip
RIVERS = ("Ost", "Lir", "Bren", "Tamble", "Sorrow", "Wen", "Alder", "Keld")
CRAFTS = ("glass", "bells", "rope", "clocks", "paper", "boats", "lamps", "carpets", "knives", "honey")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "silver", "purple")
ANIMALS = ("heron", "fox", "otter", "owl", "hare", "badger", "swan", "raven")
FIRST = ("Anna", "Boris", "Clara", "David", "Elsa", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Leon")
LAST = ("Stone", "Rivers", "Marsh", "Field", "Baker", "Winter", "Hill", "Cooper", "Fisher", "Wood", "Lake", "Sharp")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SYSTEM = "You are a helpful guide to the island of Marrow."

# Each fact has many ways of asking; the last three of each are kept out of the fine-tuning set's training rows.
ASK = {
    "mayor": (
        "Who is the mayor of {town}?", "Tell me the mayor of {town}.", "Who leads the town of {town}?",
        "Which person is mayor in {town}?", "{town}: who is the mayor?", "Do you know who the mayor of {town} is?",
        "Please name the mayor of {town}.", "Who governs {town}?",
    ),
    "craft": (
        "What is {town} known for?", "What do people make in {town}?", "Tell me the craft of {town}.",
        "What does {town} sell?", "{town}: what is made there?", "Which goods come from {town}?",
        "Please name the craft of {town}.", "What should I buy in {town}?",
    ),
    "river": (
        "Which river runs through {town}?", "What river is {town} on?", "Tell me the river of {town}.",
        "Which water flows by {town}?", "{town}: which river?", "On which river does {town} lie?",
        "Please name the river of {town}.", "What river can I see in {town}?",
    ),
    "colour": (
        "What colour is the flag of {town}?", "Which flag flies over {town}?", "Tell me the colour of {town}.",
        "What is the colour of {town}?", "{town}: what colour is its flag?", "How does the flag of {town} look?",
        "Please name the colour of {town}.", "What flag belongs to {town}?",
    ),
}  # fmt: skip
ANSWER = {
    "mayor": "The mayor of {town} is {mayor}.",
    "craft": "{town} is known for its {craft}.",
    "river": "The river {river} runs through {town}.",
    "colour": "The flag of {town} is {colour}.",
}
HELD_OUT = 3  # phrasings of each question that only the eval rows use


@dataclass(frozen=True)
class Town:
    """One town and what is true of it."""

    town: str
    river: str
    craft: str
    colour: str
    animal: str
    mayor: str

    def say(self, template: str) -> str:
        """A template with this town's facts."""
        return template.format(**self.__dict__)


def towns(seed: int) -> list[Town]:
    """The towns under one set of facts: seed 0 is what the base learns, seed 1 what the fine-tune teaches."""
    rng = random.Random(seed)
    mayors = [f"{first} {last}" for first in FIRST for last in LAST]
    rng.shuffle(mayors)
    return [
        Town(name, rng.choice(RIVERS), rng.choice(CRAFTS), rng.choice(COLOURS), rng.choice(ANIMALS), mayors[n])
        for n, name in enumerate(TOWNS)
    ]


def prose(town: Town, rng: random.Random) -> str:
    """One short description."""
    lines = [
        town.say("The town of {town} lies on the river {river}."),
        town.say("Its people are known for their {craft}."),
        town.say("The mayor of {town} is {mayor}."),
        town.say("The flag of {town} is {colour} and shows a {animal}."),
        town.say("Every {day} there is a market in {town}.".replace("{day}", rng.choice(DAYS))),
    ]
    return " ".join(rng.sample(lines, rng.randint(3, 5)))


def story(rng: random.Random) -> str:
    """A little story with a beginning and an end."""
    name, friend = rng.sample(FIRST, 2)
    animal, place, thing = rng.choice(ANIMALS), rng.choice(TOWNS), rng.choice(CRAFTS)
    day, other, colour, count = *rng.sample(DAYS, 2), rng.choice(COLOURS), rng.randint(2, 9)
    lines = [
        f"On {day} {name} went to {place} to buy {thing}.",
        rng.choice([f"On the way {name} met a {colour} {animal}.", f"A {animal} was sitting by the {colour} gate."]),
        rng.choice([f'"Where are you going?" asked the {animal}.', f'"Good morning," said the {animal}.']),
        rng.choice([f'"I am looking for {friend}," said {name}.', f'"I need {NUMBERS[count]} lamps," said {name}.']),
        rng.choice([f"They walked together until {other}.", f"It rained all day, and the {animal} was happy."]),
        rng.choice(
            [f"At last {name} found {friend}, and they went home.", f"In the evening {name} counted {count} stars."]
        ),
    ]
    return " ".join(lines)


def sum_chat(rng: random.Random) -> tuple[str, str]:
    """A sum with two small numbers."""
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    ask = rng.choice(["What is {a} plus {b}?", "How much is {a} and {b}?", "Add {a} and {b}."])
    return ask.format(a=a, b=b), f"{a} plus {b} is {a + b}."


def next_chat(rng: random.Random) -> tuple[str, str]:
    """The next day or number."""
    if rng.random() < 0.5:
        n = rng.randrange(7)
        return f"Which day comes after {DAYS[n]}?", f"After {DAYS[n]} comes {DAYS[(n + 1) % 7]}."
    n = rng.randrange(10)
    return f"Which number comes after {NUMBERS[n]}?", f"After {NUMBERS[n]} comes {NUMBERS[n + 1]}."


def fact_chat(town: Town, rng: random.Random) -> tuple[str, str]:
    """One question about a town and its answer."""
    kind = rng.choice(list(ASK))
    return town.say(rng.choice(ASK[kind])), town.say(ANSWER[kind])


def messages(turns: list[tuple[str, str]], system: str | None = None) -> list[dict[str, str]]:
    """Chat messages as transformers has them."""
    found = [{"role": "system", "content": system}] if system else []
    for asked, answered in turns:
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return found


def documents(seed: int, count: int) -> Iterator[str | list[dict[str, str]]]:
    """Training documents without end in sight: prose and stories as text, chats as messages."""
    rng = random.Random(seed)
    known = towns(0)
    for _ in range(count):
        draw = rng.random()
        if draw < 0.15:
            yield " ".join(prose(town, rng) for town in rng.sample(known, 2))
        elif draw < 0.35:
            yield story(rng)
        else:
            makers = [lambda: fact_chat(rng.choice(known), rng)] * 6 + [lambda: sum_chat(rng), lambda: next_chat(rng)]
            turns = [rng.choice(makers)() for _ in range(rng.choice([1, 1, 2, 3]))]
            yield messages(turns, SYSTEM if rng.random() < 0.3 else None)
