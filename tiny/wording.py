"""Say the questions of `scenes.py` in other words: phrasings, synonyms, two spellings of English.

`reword` replaces a question by one that has the same answer. It keeps every second one as it is.
"""

import random
import re

# A pattern of a question of scenes.py → what people ask for the same; {0} is the first group.
PHRASINGS = {
    r"(?:Describe .*|What do you see)[.?]": (
        "Describe the drawing.",
        "What is in the image?",
        "What is in this picture?",
        "What does the image show?",
        "What can you see in the picture?",
        "Please describe the image.",
    ),
    r"(?:How many|Count the) ([a-z]+(?: shapes)?)(?: are there| do you see)?[.?]": (
        "How many {0} are in the image?",
        "How many {0} can you see?",
        "How many {0} does the picture show?",
        "What is the number of {0}?",
        "Count all {0}.",
    ),
    r"(?:What is|What do you see) ((?:at|in) the .+)\?": (
        "What can you see {0}?",
        "What is there {0}?",
        "Which shape and colour is {0}?",
        "What is located {0}?",
    ),
    r"(?:What|Which) colour (?:is|does) the (.+?)(?: have)?\?": (
        "What is the colour of the {0}?",
        "Tell me the colour of the {0}.",
        "The {0} has which colour?",
        "Which colour is the {0}?",
    ),
    r"(?:What|Which) shape is (.+)\?": (
        "What kind of shape is {0}?",
        "Which kind of shape do you see {0}?",
        "What shape is there {0}?",
    ),
    r"(?:Where is|Where do you see|Tell me where) the (.+?)(?: is)?[.?]": (
        "Where is the {0} located?",
        "Where in the image is the {0}?",
        "Where can you see the {0}?",
        "What is the position of the {0}?",
        "In which part of the image is the {0}?",
        "Where's the {0}?",
    ),
    r"Is the (.+) (left of|right of|above|below) the (.+)\?": (
        "Is the {0} located {1} the {2}?",
        "Do you see the {0} {1} the {2}?",
        "Does the {0} lie {1} the {2}?",
    ),
    r"(?:Find|Detect|Draw a box around) the (.+)\.": (
        "Locate the {0}.",
        "Give the box of the {0}.",
        "Mark the {0}.",
        "Find the box of the {0}.",
        "Please find the {0}.",
    ),
    r"(?:What is written here\?|Read the text\.|What does it say\?)": (
        "What is written in the image?",
        "What does the text say?",
        "Which text is in the picture?",
        "Please read the text.",
    ),
    r"Which way does the ball move\?|Where does the ball go\?": (
        "In which direction does the ball move?",
        "Which direction does the ball go?",
        "Where does the ball move?",
        "How does the ball move?",
    ),
}
SYNONYMS = {  # of the places and of a few nouns
    "at the top left": ("in the top left corner", "in the upper left", "at the upper left"),
    "at the top right": ("in the top right corner", "in the upper right", "at the upper right"),
    "at the bottom left": ("in the bottom left corner", "in the lower left", "at the lower left"),
    "at the bottom right": (
        "in the bottom right corner",
        "in the lower right",
        "at the lower right",
    ),
    "in the center": ("in the middle", "in the centre", "at the center"),
    "at the left": ("on the left", "on the left side", "at the left edge"),
    "at the right": ("on the right", "on the right side", "at the right edge"),
    "at the top": ("at the top center", "in the top middle", "at the upper edge"),
    "at the bottom": ("at the bottom center", "in the bottom middle", "at the lower edge"),
    "left of": ("to the left of",),
    "right of": ("to the right of",),
    "above": ("over",),
    "below": ("under",),
    "picture": ("image",),
    "image": ("picture",),
    "colour": ("color", "color", "color"),
}
WORDS = re.compile("|".join(rf"\b{words}\b" for words in sorted(SYNONYMS, key=len, reverse=True)))


def reword(rng: random.Random, question: str) -> str:
    """Return the question, half of the times in other words."""
    if rng.random() < 0.5:
        for pattern, phrasings in PHRASINGS.items():
            match = re.fullmatch(pattern, question)
            if match:
                question = rng.choice(phrasings).format(*match.groups())
                break
    if rng.random() < 0.5:
        question = WORDS.sub(lambda match: rng.choice(SYNONYMS[match.group()]), question)
    return question
