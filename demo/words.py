"""Word lists that the generators of skills and of small talk draw from.

Knows words and nothing else.  The lists are part of the corpus's definition: changing one moves
questions between the training and the held-out split of the skills that use it.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ada Alan Alice Amir Anna Ben Bruno Carla Chen Clara Daniel David Diana Elena Emma Eric
    Eva Fatima Felix Grace Hana Hugo Ida Ines Ivan Jack Jane John Julia Karl Kate Lars Laura
    Leo Lina Lucas Maria Mark Mia Nina Noah Nora Olga Oscar Paul Peter Rosa Sam Sara Sofia
    Tariq Tom Vera Victor Wei Yuki Zoe
    """
)

CITIES = _words(
    """
    Athens Berlin Boston Cairo Delhi Dublin Geneva Hanoi Kyoto Lagos Lima Lisbon London
    Madrid Milan Nairobi Oslo Paris Prague Quito Rome Seoul Sydney Tokyo Toronto Vienna
    Warsaw Zurich
    """
)

COUNTRIES = _words(
    """
    Austria Brazil Canada Chile China Cuba Denmark Egypt Finland France Germany Ghana Greece
    India Iran Ireland Italy Japan Kenya Mexico Norway Peru Poland Portugal Russia Spain
    Sweden Turkey Ukraine
    """
)

LANGUAGES = _words(
    """
    Arabic Chinese Danish Dutch English Finnish French German Greek Hindi Italian Japanese
    Latin Polish Russian Spanish Swahili Turkish
    """
)

COLOURS = _words(
    """
    black blue brown gold green grey orange pink purple red silver white yellow
    """
)

NOUNS = _words(
    """
    anchor apple arrow bag ball banana basket bell bird boat book bottle box bread bridge
    brush bucket button cake camera candle car carpet castle cat chair cheese cherry clock
    cloud coat coin cup desk dog door dream drum eagle egg engine farm feather fence field
    fire fish flag flower forest fork fox garden gate glass glove goat grape grass guitar
    hammer hat hill honey horse house ice island jacket jar key king kite knife ladder lake
    lamp leaf lemon letter lion map market melon milk mirror money moon mouse nail needle
    nest night nose ocean olive onion orange oven paper park pear pen pencil piano picture
    pig pillow plane plant plate pocket potato queen rabbit radio rain ring river road robot
    roof rope rose salt sand school shell ship shirt shoe sister snow soap sock spoon star
    stone street sugar sun table tent ticket tiger tower train tree truck umbrella valley
    village violin wall watch water wheel wind window winter wolf yard zebra
    """
)

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("fast", "slow"),
    ("light", "dark"),
    ("open", "closed"),
    ("old", "new"),
    ("early", "late"),
    ("full", "empty"),
    ("hard", "soft"),
    ("high", "low"),
    ("loud", "quiet"),
    ("long", "short"),
    ("rich", "poor"),
    ("strong", "weak"),
    ("thick", "thin"),
    ("wet", "dry"),
    ("wide", "narrow"),
    ("day", "night"),
    ("up", "down"),
    ("left", "right"),
)

WEEKDAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)

MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
