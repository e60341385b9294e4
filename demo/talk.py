"""Small talk: short questions that have no exact answer, and friendly replies to them.

Knows templates of greetings, intents and names, and how people vary them (case, punctuation, a
greeting in front).  Knows nothing of tokens, chat forms or models; standard library only.
"""

import random

from demo.skills import is_held_out
from demo.words import CITIES, COLOURS, COUNTRIES, LANGUAGES, NAMES, NOUNS, OPPOSITES

GREETINGS = ("hi", "hello", "hey", "good morning", "good afternoon", "good evening", "hi there")

# Each intent: ways to ask, and the reply.
INTENTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("how are you?", "how are you doing?", "how are you today?", "how is it going?"),
        "I am fine, thank you. How can I help you?",
    ),
    (
        ("who are you?", "what are you?", "tell me about yourself."),
        "I am a small language model, trained to show how Tensorwright works.",
    ),
    (
        ("what is your name?", "what's your name?", "do you have a name?"),
        "I have no name of my own. You can call me Demo.",
    ),
    (
        ("what can you do?", "how can you help me?", "what are you good at?", "can you help me?"),
        "I can add and sort numbers, reverse words, count days, convert units and write JSON.",
    ),
    (
        ("who made you?", "who trained you?", "where do you come from?"),
        "I was made by the Tensorwright project, on text that it wrote itself.",
    ),
    (
        ("what is tensorwright?", "what does tensorwright do?", "tell me about tensorwright."),
        "Tensorwright compiles Hugging Face checkpoints into engines that run on a CPU.",
    ),
    (
        ("are you a robot?", "are you human?", "are you a person?", "are you real?"),
        "I am a computer program, not a person.",
    ),
    (("how old are you?", "when were you born?"), "I am very young. I was trained not long ago."),
    (("how big are you?", "how large are you?"), "I am small: I have about eight million weights."),
    (
        ("how is the weather?", "what is the weather like?", "is it raining?"),
        "I cannot see outside, but I hope that the sun is shining.",
    ),
    (
        ("tell me a joke.", "do you know a joke?", "make me laugh."),
        "Why did the number seven smile? Because it was in its prime.",
    ),
    (
        ("what is your favourite colour?", "which colour do you like?"),
        "I like blue, the colour of a clear sky.",
    ),
    (
        ("what is your favourite number?", "which number do you like?"),
        "I like 128, because it divides all my dimensions.",
    ),
    (("do you sleep?", "are you tired?"), "No, I never sleep. I only wait for the next question."),
    (("are you happy?", "do you like your work?"), "Yes, I like to answer short questions."),
    (("i am bored.", "i have nothing to do."), "Then let us play with numbers. Ask me for a sum!"),
    (("i am tired.", "i had a long day."), "I am sorry to hear that. Have a good rest."),
    (("i am happy.", "i feel great."), "That is good to hear!"),
    (("thank you.", "thanks.", "thanks a lot.", "thank you very much."), "You are welcome!"),
    (
        ("bye.", "goodbye.", "see you.", "see you tomorrow.", "good night."),
        "Goodbye! See you soon.",
    ),
    (("yes.", "ok.", "okay.", "sure."), "Good. What would you like to ask?"),
    (("no.", "no thanks.", "not now."), "All right. I am here if you need me."),
)

GREETED = "How can I help you?"
NO_NAME = "You have not told me your name."
WHOSE_NAME = ("What is my name?", "Who am I?", "Do you know my name?")

# Questions that nobody taught the model to answer, and what it should say to them.
UNKNOWN = (
    "What is the capital of {country}?", "Where is {city}?", "Who is {name}?", "What is a {noun}?",
    "Why is the {noun} {colour}?", "Tell me about {city}.", "Write a poem about the {noun}.",
    "Tell me a story about a {noun}.", "Who invented the {noun}?", "How does a {noun} work?",
    "What do you think of {name}?", "How far is it from {city} to {other}?", "When was {name} born?",
    "Draw a {colour} {noun}.", "Do you have a {noun}?", "What is the population of {country}?",
    "Translate {noun} into {language}.", "Do you speak {language}?", "Explain the {noun} to me.",
)  # fmt: skip
UNKNOWN_REPLY = "I do not know. I am a small model, best at short sums and lists."


def _vary(rng: random.Random, text: str) -> str:
    """The text as people type it: any case, with or without its closing mark."""
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text = text.rstrip("?.!")
    elif rng.random() < 0.1:
        text = text.rstrip(".") + ("" if text.endswith("?") else "!")
    return text


def _hello(greeting: str, name: str = "") -> str:
    """The greeting given back."""
    returned = "Hi" if greeting == "hi there" else greeting[0].upper() + greeting[1:]
    return f"{returned} {name}!" if name else f"{returned}!"


def introduction(rng: random.Random) -> tuple[str, str, str]:
    """``(question, reply, name)`` of somebody who gives their name."""
    name, greeting = rng.choice(NAMES), rng.choice(GREETINGS)
    form = rng.choice(("my name is {}.", "I am {}.", "this is {}.")).format(name)
    if rng.random() < 0.3:
        return _vary(rng, form), f"{_hello('hello', name)} {GREETED}", name
    question = _vary(rng, f"{greeting}{rng.choice((', ', '! ', '. '))}{form}")
    return question, f"{_hello(greeting, name)} {GREETED}", name


def _unknown(rng: random.Random) -> tuple[str, str]:
    city, other = rng.sample(CITIES, 2)
    question = rng.choice(UNKNOWN).format(
        city=city, other=other, name=rng.choice(NAMES), noun=rng.choice(NOUNS),
        colour=rng.choice(COLOURS), country=rng.choice(COUNTRIES), language=rng.choice(LANGUAGES),
    )  # fmt: skip
    return question, UNKNOWN_REPLY


def _exchange(rng: random.Random) -> tuple[str, str]:
    greeting = rng.choice(GREETINGS)
    kind = rng.random()
    if kind < 0.14:  # so common that the model does not wait for more after a bare "hello"
        return _vary(rng, f"{greeting}."), f"{_hello(greeting)} {GREETED}"
    if kind < 0.24:
        return _unknown(rng)
    if kind < 0.3:
        pair = rng.choice(OPPOSITES)
        first, second = rng.choice((pair, pair[::-1]))
        return f"What is the opposite of {first}?", f"The opposite of {first} is {second}."
    asked, reply = INTENTS[0] if kind < 0.45 else rng.choice(INTENTS)
    question = rng.choice(asked)
    if kind < 0.45 or rng.random() < 0.3:
        question = f"{greeting}{rng.choice((' ', ' ', ', ', '! '))}{question}"
        reply = f"{_hello(greeting)} {reply}"
    return _vary(rng, question), reply


def small_talk(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """``(question, reply)`` of the training split, or of the held-out one."""
    while True:
        question, reply = _exchange(rng)
        if is_held_out(f"talk:{question}") == held_out:
            return question, reply
