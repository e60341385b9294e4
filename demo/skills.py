"""Small skills whose answers can be checked, and the split into training and held-out questions.

Knows how to make a question, its one right answer, and the *key* that says what is asked.  The
split is by the key, not by the wording: if ``12 + 34`` is held out, then every phrasing of it is,
and ``34 + 12`` as well.  Knows nothing of tokens, chat forms or models; standard library only.
"""

import calendar
import datetime
import hashlib
import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from demo.words import CITIES, COLOURS, MONTHS, NAMES, NOUNS, WEEKDAYS

HELD_OUT_SHARE = 16  # one key in so many is held out


@dataclass(frozen=True)
class Item:
    """One question.  ``key`` is what is asked, freed of its wording."""

    skill: str
    key: str
    question: str
    answer: str


def is_held_out(key: str) -> bool:
    """Whether this key belongs to the held-out split; the same on every machine."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _item(rng: random.Random, skill: str, key: object, answer: str, *forms: str) -> Item:
    return Item(skill, f"{skill}:{key}", rng.choice(forms), answer)


def _number(rng: random.Random) -> int:
    """Up to three digits, with short numbers far more common than a uniform draw has them."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def add(rng: random.Random) -> Item:
    a, b = _number(rng), _number(rng)
    return _item(
        rng, "add", sorted((a, b)), str(a + b),
        f"What is {a} + {b}?", f"{a} + {b} =", f"Add {a} and {b}.", f"How much is {a} plus {b}?",
        f"What is {a}+{b}?", f"{a}+{b}=",
    )  # fmt: skip


def subtract(rng: random.Random) -> Item:
    b, a = sorted((_number(rng), _number(rng)))
    return _item(
        rng, "subtract", (a, b), str(a - b),
        f"What is {a} - {b}?", f"{a} - {b} =", f"Subtract {b} from {a}.",
        f"How much is {a} minus {b}?", f"What is {a}-{b}?", f"{a}-{b}=",
    )  # fmt: skip


def multiply(rng: random.Random) -> Item:
    a, b = rng.randrange(10 ** rng.choice((1, 2, 2, 3))), rng.randrange(10)
    first, second = rng.choice(((a, b), (b, a)))
    return _item(
        rng, "multiply", sorted((a, b)), str(a * b),
        f"What is {first} * {second}?", f"{first} * {second} =",
        f"Multiply {first} by {second}.", f"How much is {first} times {second}?",
        f"What is {first}*{second}?", f"{first}*{second}=",
    )  # fmt: skip


def sort_numbers(rng: random.Random) -> Item:
    numbers = rng.sample(range(100), rng.randint(3, 6))
    down = rng.random() < 0.4
    listed = ", ".join(map(str, numbers))
    ordered = sorted(numbers, reverse=down)
    way = "from largest to smallest" if down else "from smallest to largest"
    forms = [f"Sort these numbers {way}: {listed}.", f"Put {listed} in order {way}."]
    if not down:
        forms.append(f"Sort the numbers {listed}.")
    answer = ", ".join(map(str, ordered))
    return _item(rng, "sort_numbers", (down, sorted(numbers)), answer, *forms)


def sort_words(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, rng.randint(2, 5))
    listed = ", ".join(words)
    return _item(
        rng, "sort_words", sorted(words), ", ".join(sorted(words)),
        f"Sort these words: {listed}.", f"Sort the words alphabetically: {listed}.",
        f"Put these words in alphabetical order: {listed}.",
    )  # fmt: skip


def _string(rng: random.Random, shortest: int, longest: int) -> str:
    """Digits, letters, or scraps of words: tokens of several letters must be spelt out too."""
    length = rng.randint(shortest, longest)
    kind = rng.choice(("digits", "letters", "scraps", "scraps"))
    if kind == "digits":
        return "".join(rng.choices(string.digits, k=length))
    if kind == "letters":
        return "".join(rng.choices(string.ascii_lowercase, k=length))
    text = ""
    while len(text) < length:
        word = rng.choice(NOUNS)
        start = rng.randrange(len(word) - 1)
        text += word[start : start + rng.randint(2, 4)]
    return text[:length]


def copy(rng: random.Random) -> Item:
    text = _string(rng, 3, 8) if rng.random() < 0.6 else " ".join(rng.sample(NOUNS, 3))
    return _item(
        rng, "copy", text, text,
        f'Repeat "{text}".', f'Copy this text: "{text}".', f'Say "{text}".',
    )  # fmt: skip


def reverse_string(rng: random.Random) -> Item:
    text = _string(rng, 3, 6)
    return _item(
        rng, "reverse_string", min(text, text[::-1]), text[::-1],
        f'Reverse "{text}".', f'Reverse the string "{text}".', f'Spell "{text}" backwards.',
    )  # fmt: skip


def reverse_list(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, rng.randint(3, 5))
    listed = ", ".join(words)
    return _item(
        rng, "reverse_list", min(words, words[::-1]), ", ".join(reversed(words)),
        f"Reverse the list: {listed}.", f"Write this list in reverse order: {listed}.",
    )  # fmt: skip


def _date(day: datetime.date) -> str:
    # No strftime: its month names follow the locale.
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def next_date(rng: random.Random) -> Item:
    day = datetime.date(1980, 1, 1) + datetime.timedelta(days=rng.randrange(29000))
    if rng.random() < 0.3:  # the turns of the month are the hard part, so they come up more often
        last = calendar.monthrange(day.year, day.month)[1]
        day = day.replace(day=rng.choice((1, last, last - 1)))
    step = rng.choice((1, -1))
    way, order = ("after", "next") if step == 1 else ("before", "previous")
    return _item(
        rng, "next_date", (day.isoformat(), step), _date(day + datetime.timedelta(days=step)),
        f"What date comes {way} {_date(day)}?", f"What is the day {way} {_date(day)}?",
        f"Give the {order} day: {_date(day)}.",
    )  # fmt: skip


def days_in_month(rng: random.Random) -> Item:
    month, year = rng.choice((2, *range(1, 13))), rng.randint(1950, 2060)
    name = MONTHS[month - 1]
    return _item(
        rng, "days_in_month", (year, month), str(calendar.monthrange(year, month)[1]),
        f"How many days does {name} {year} have?", f"How many days are in {name} {year}?",
    )  # fmt: skip


def weekday(rng: random.Random) -> Item:
    start, count = rng.randrange(7), rng.randint(1, 60)
    step = rng.choice((count, -count))
    way = "after" if step > 0 else "before"
    days = "day" if count == 1 else "days"
    return _item(
        rng, "weekday", (start, step), WEEKDAYS[(start + step) % 7],
        f"What day is {count} {days} {way} {WEEKDAYS[start]}?",
        f"Which weekday comes {count} {days} {way} {WEEKDAYS[start]}?",
    )  # fmt: skip


def clock(rng: random.Random) -> Item:
    start, length = rng.randrange(24 * 60), rng.randint(1, 90)
    end = (start + length) % (24 * 60)
    begin = f"{start // 60:02}:{start % 60:02}"
    return _item(
        rng, "clock", (start, length), f"{end // 60:02}:{end % 60:02}",
        f"What time is it {length} minutes after {begin}?", f"It is {begin}. Add {length} minutes.",
    )  # fmt: skip


# from, to, a power of ten or sixty, largest amount
UNITS = (
    ("m", "cm", 100.0, 999),
    ("cm", "m", 0.01, 999),
    ("km", "m", 1000.0, 999),
    ("m", "km", 0.001, 9999),
    ("kg", "g", 1000.0, 999),
    ("g", "kg", 0.001, 9999),
    ("l", "ml", 1000.0, 999),
    ("ml", "l", 0.001, 9999),
    ("cm", "mm", 10.0, 999),
    ("hours", "minutes", 60.0, 99),
    ("minutes", "seconds", 60.0, 99),
)


def units(rng: random.Random) -> Item:
    source, target, factor, largest = rng.choice(UNITS)
    amount = rng.randint(2, largest)
    if largest > 999 and rng.random() < 0.5:
        amount = (amount // 50 + 1) * 50
    result = f"{amount * factor:.3f}".rstrip("0").rstrip(".")
    return _item(
        rng, "units", (source, target, amount), f"{result} {target}",
        f"Convert {amount} {source} to {target}.", f"How many {target} are {amount} {source}?",
        f"What is {amount} {source} in {target}?",
    )  # fmt: skip


def _record(rng: random.Random) -> dict[str, str | int]:
    fields: dict[str, str | int] = {
        "name": rng.choice(NAMES),
        "age": rng.randint(1, 99),
        "city": rng.choice(CITIES),
        "colour": rng.choice(COLOURS),
        "item": rng.choice(NOUNS),
        "count": rng.randint(0, 999),
    }
    return {field: fields[field] for field in rng.sample(sorted(fields), rng.randint(2, 4))}


def write_json(rng: random.Random) -> Item:
    record = _record(rng)
    *most, last = [f"{field} {value}" for field, value in record.items()]
    listed = f"{', '.join(most)} and {last}"
    return _item(
        rng, "write_json", sorted(record.items()), json.dumps(record),
        f"Write a JSON object with {listed}.", f"Make JSON with {listed}.",
    )  # fmt: skip


def read_json(rng: random.Random) -> Item:
    record = _record(rng)
    field = rng.choice(list(record))
    text = json.dumps(record)
    return _item(
        rng, "read_json", (field, sorted(record.items())), str(record[field]),
        f'Read the field "{field}" from {text}.', f"What is the {field} in {text}?",
    )  # fmt: skip


def compare(rng: random.Random) -> Item:
    numbers = list({_number(rng) for _ in range(rng.randint(3, 5))} | {_number(rng)})
    rng.shuffle(numbers)
    largest = rng.random() < 0.5
    listed = ", ".join(map(str, numbers))
    word = "largest" if largest else "smallest"
    return _item(
        rng, "compare", (largest, sorted(numbers)), str((max if largest else min)(numbers)),
        f"What is the {word} of these numbers: {listed}?", f"Which number is the {word}: {listed}?",
    )  # fmt: skip


def count_words(rng: random.Random) -> Item:
    words = rng.sample(NOUNS, rng.randint(1, 7))
    return _item(
        rng, "count_words", sorted(words), str(len(words)),
        f"How many words are in this list: {', '.join(words)}?",
        f"Count the words: {', '.join(words)}.",
    )  # fmt: skip


def parity(rng: random.Random) -> Item:
    number = rng.randrange(10 ** rng.randint(1, 4))
    return _item(
        rng, "parity", number, "odd" if number % 2 else "even",
        f"Is {number} even or odd?", f"Is the number {number} odd or even?",
    )  # fmt: skip


def sequence(rng: random.Random) -> Item:
    start, step = rng.randrange(60), rng.randint(1, 12)
    *shown, answer = range(start, start + 5 * step, step)
    listed = ", ".join(map(str, shown))
    return _item(
        rng, "sequence", (start, step), str(answer),
        f"What number comes next: {listed}?", f"Continue the sequence: {listed}.",
    )  # fmt: skip


# Each skill with its share of the questions: the harder a skill is to learn, the more of it.
SKILLS: tuple[tuple[Callable[[random.Random], Item], float], ...] = (
    (add, 3), (subtract, 3), (multiply, 6), (sort_numbers, 2), (sort_words, 2), (copy, 1),
    (reverse_string, 2.5), (reverse_list, 1), (next_date, 1.5), (days_in_month, 0.7), (weekday, 2),
    (clock, 2.5), (units, 1.5), (write_json, 1), (read_json, 0.7), (compare, 1), (count_words, 0.5),
    (parity, 0.3), (sequence, 1.5),
)  # fmt: skip

_MAKERS: Sequence[Callable[[random.Random], Item]] = [maker for maker, _ in SKILLS]
_SHARES = [share for _, share in SKILLS]


def training_question(rng: random.Random) -> Item:
    """A question of the training split; skills come up in the shares of ``SKILLS``."""
    while True:
        item = rng.choices(_MAKERS, _SHARES)[0](rng)
        if not is_held_out(item.key):
            return item


def held_out_items(count: int, seed: int) -> list[Item]:
    """``count`` held-out questions, the skills taken in turn so that each has the same share.

    No question comes twice.  A skill that has too few held-out questions gives what it has, so a
    large ``count`` can return fewer.
    """
    rng = random.Random(seed)
    items: list[Item] = []
    seen: set[str] = set()
    for turn in range(count):
        maker = _MAKERS[turn % len(_MAKERS)]
        for _ in range(5000):
            item = maker(rng)
            if is_held_out(item.key) and item.question not in seen:
                seen.add(item.question)
                items.append(item)
                break
    return items


def held_out_questions(count: int, seed: int) -> list[tuple[str, str, str]]:
    """``(skill, question, answer)`` of ``held_out_items(count, seed)``."""
    return [(item.skill, item.question, item.answer) for item in held_out_items(count, seed)]
