"""The curriculum of the bundled model: which topics are trained at which step, and the learning
rate.

Every step has six parts, and each part of the batch has one topic. An entry of TOPICS_FROM lists
topics separated by spaces: from that step on, the parts take them in turn. A number behind a topic
is the largest number of shapes in an image; those images are small.

Measurements behind the order are in LOG.md. In short: lone shapes are described first, because a
model that is only asked for places learns to drop the colors. Finding a shape by its name is
learned late but then fast, from many questions with short answers, once the model knows what is
where. In the same way "Which picture shows a red circle?" follows "What is in picture 2?", and both
start with lone shapes, as boxes do. From step 20,000 on, a topic that lags behind gets most of the
parts for a while; then all topics return.

Up to step 88,500 all images are of the framed style of scenes.py. From there on they are of the
open style, except those of topics that begin with "framed-", and a number behind a topic does not
change their size. Places come first again, from lone shapes, because the model had found them by
the frame. Lone shapes and videos, which only positions answer, are a third of the parts up to step
93,000 and from step 100,000 on; between these, what had been forgotten is asked more often.
"""

import math
from dataclasses import dataclass

from tiny.scenes import SKILLS
from tiny.sizes import SMALL, START, WHOLE

TOPICS_FROM = {
    0: "lone lone words",
    400: "places places places places places words",
    2000: "names places names places names words",
    5000: "shapes words boxes1 inside1 clip1 shapes names words boxes1 inside1 clip1 shapes",
    6000: "shapes words boxes2 which1 clip counts names words boxes2 which1 inside1 counts",
    7000: "shapes words inside1 inside1 clip1 counts names words inside1 inside1 boxes1 clip1",
    8000: "shapes inside1 inside1 words inside1 inside1",
    8500: "names which1 which1 words which1 which1",
    9000: "counts boxes1 boxes1 words boxes1 which2",
    9500: "names more1 more1 words which2 boxes2",
    10_000: "shapes words boxes3 which3 clip shapes names words boxes3 more2 clip counts",
    12_000: "shapes words boxes album clip shapes names words boxes more clip shapes",
    20_000: "boxes1 boxes1 shapes words boxes1 counts",
    20_500: "counts counts shapes words boxes1 counts",
    21_000: "names names shapes words boxes2 inside2",
    21_500: "inside3 inside3 shapes words boxes2 clip",
    22_000: "shapes words boxes album clip counts names words boxes more inside shapes",
    23_500: "pairs pairs boxes words pairs pairs",
    24_500: "events events boxes words pairs events",
    25_000: "shapes words boxes album clip counts pairs words boxes more inside events",
    32_000: "colors colors words boxes colors colors",
    32_500: "which which words boxes which more",
    33_000: "more more words boxes more which",
    33_500: "colors2 colors2 words boxes colors2 colors2",
    34_500: "colors3 colors3 words boxes colors3 which2",
    35_000: "which2 which2 more2 words boxes more2",
    36_000: "boxes boxes2 words boxes boxes words",
    38_500: "more more words boxes more counts",
    39_500: "boxes boxes words boxes2 colors2 boxes",
    42_000: (
        "shapes words boxes more counts words boxes album clip shapes words boxes colors words "
        "more pairs"
    ),
    44_500: (
        "shapes words boxes more counts pairs album words boxes clip shapes events inside words "
        "boxes more counts colors"
    ),
    46_500: "pairs pairs counts words pairs pairs",
    47_000: (
        "shapes words boxes more counts pairs album words boxes clip shapes events inside words "
        "pairs more counts pairs"
    ),
    50_000: "chat chat words boxes chat chat",
    51_000: "inside inside which words boxes which",
    52_000: "more counts more words boxes counts",
    52_500: "more counts pairs words boxes pairs",
    53_500: "events events pairs words chat clip",
    54_500: (
        "shapes words boxes more counts chat words album boxes clip shapes words events inside "
        "boxes more counts chat words pairs"
    ),
    58_000: (
        "shapes words boxes counts chat more words album boxes clip counts words events boxes "
        "shapes inside words counts boxes more pairs chat"
    ),
    65_000: (
        "shapes words boxes more counts chat words album more boxes chat counts words clip which "
        "boxes more chat inside events words pairs"
    ),
    67_500: "chat2 chat2 counts pairs chat2 chat2",
    68_300: "chat3 chat3 counts pairs chat words",
    68_800: (
        "shapes words boxes counts chat more words told boxes counts which words clip counts more "
        "pairs album words shapes boxes counts chat inside events more told"
    ),
    74_500: (
        "more shapes boxes more chat words more counts boxes more album words chat more which "
        "clip pairs more words boxes shapes inside events counts chat told"
    ),
    78_000: "kinds kinds boxes words more kinds",
    78_500: (
        "more shapes boxes kinds words counts boxes more words kinds album clip which counts "
        "kinds words more boxes chat pairs kinds shapes inside words events told"
    ),
    79_500: "kinds2 kinds2 words more kinds2 kinds2",
    80_200: (
        "more shapes boxes kinds2 words counts boxes more words kinds album clip which counts "
        "kinds words more boxes chat pairs kinds2 shapes inside words events told"
    ),
    83_000: (
        "more shapes boxes kinds2 words more counts boxes more words kinds album more clip counts "
        "kinds words more boxes chat pairs more kinds2 shapes words inside events told"
    ),
    85_500: (
        "more shapes boxes kinds2 words counts boxes more words kinds album counts clip more "
        "kinds words more boxes chat counts pairs kinds2 shapes words inside events counts told"
    ),
    88_500: "spots1",
    89_000: (
        "shapes2 spots1 words shapes3 names2 inside1 boxes1 clip1 shapes2 counts3 spots1 words "
        "framed-shapes boxes1 clip"
    ),
    89_600: (
        "shapes3 boxes1 words inside2 spots1 shapes boxes1 clip framed-words shapes words counts "
        "which2 boxes2 framed-shapes spots1 more2 words clip words framed-album boxes1 boxes1 "
        "framed-clip"
    ),
    90_400: (
        "shapes spots1 words boxes1 clip inside framed-shapes counts spots1 which words boxes1 "
        "shapes chat more framed-clip boxes1 words spots1 boxes events framed-album shapes "
        "words spots1 clip more framed-words counts boxes1 album words chat events "
        "framed-shapes shapes boxes clip framed-chat"
    ),
    90_500: (
        "describe spots1 words boxes1 clip shapes describe counts framed-shapes boxes1 words "
        "events describe3 spots1 more inside framed-clip shapes words boxes1 describe album "
        "framed-words spots1 clip chat boxes words shapes framed-describe boxes1 describe "
        "events framed-album spots1 more words counts shapes clip framed-shapes"
    ),
    93_000: (
        "describe boxes shapes words counts boxes1 clip describe inside shapes spots1 words events "
        "boxes2 describe counts more framed-shapes shapes album boxes words clip describe inside2 "
        "framed-words which shapes boxes spots1 counts chat events describe framed-album words "
        "shapes framed-boxes framed-clip inside boxes counts words"
    ),
    99_000: (
        "boxes colors boxes1 shapes colors boxes words counts boxes2 colors framed-colors boxes "
        "clip describe framed-boxes inside"
    ),
    100_000: (
        "boxes1 inside spots1 shapes words clip describe boxes counts spots1 inside events "
        "boxes1 describe which framed-shapes clip words shapes boxes album spots1 inside2 "
        "framed-boxes events counts more framed-clip boxes spots1 chat words clip framed-shapes "
        "describe boxes1 framed-words inside colors events counts boxes"
    ),
}


@dataclass(frozen=True)
class Topic:
    """What the samples of a topic show and ask.

    samples: the topic of `scenes.make_sample`. skills: of the questions. most_questions: in one
    conversation. question_work, image_work: the cost in patches of a question and of 28×28 pixels
    of the images, or of the pairs of frames, relative to one image.
    """

    samples: str
    skills: tuple[str, ...]
    most_questions: int
    question_work: float
    image_work: float = 1


TOPICS = {
    "shapes": Topic("shapes", SKILLS["shapes"], 8, 30),
    "lone": Topic("shapes", ("describe",), 1, 30),
    "places": Topic("shapes", ("describe", "count", "what", "shape"), 8, 30),
    "names": Topic("shapes", ("where", "color", "relation"), 8, 25),
    "counts": Topic("shapes", ("count", "relation"), 5, 25),
    "chat": Topic("shapes", ("chat",), 1, 25),
    "kinds": Topic("shapes", ("chat",), 1, 25),  # more of the chats that name a shape by its kind
    "told": Topic("shapes", SKILLS["shapes"], 4, 30),  # the description precedes the questions
    "pairs": Topic("shapes", ("color", "relation"), 2, 25),
    "colors": Topic("shapes", ("color",), 1, 25),
    "describe": Topic("shapes", ("describe",), 1, 60),
    "spots": Topic("shapes", ("where", "ground", "what", "describe"), 4, 30),
    "boxes": Topic("shapes", ("ground",), 2, 40),
    "words": Topic("words", ("read",), 1, 45),
    "album": Topic("album", SKILLS["album"], 8, 25, 2.5),
    "inside": Topic("album", ("inside",), 1, 35, 2.5),
    "which": Topic("album", ("shows",), 1, 25, 2.5),
    "more": Topic("album", ("compare",), 1, 25, 2.5),
    "clip": Topic("clip", SKILLS["clip"], 8, 20, 3),
    "events": Topic("clip", ("video",), 1, 20, 3),
}


@dataclass(frozen=True)
class Part:
    """What one part of a batch is made of: the name of its topic, the stage and the most shapes."""

    topic: str
    stage: int
    most_shapes: int
    style: str = "framed"


@dataclass(frozen=True)
class Curriculum:
    """The order of the training data.

    topics_from: step → topics, separated by spaces. small_from, all_sizes_from: the steps from
    which on images are small, and of all sizes; for printed words separately, because letters are
    learned much sooner than places. grow_every: after so many steps images may have one more shape,
    from one up to six.
    """

    topics_from: dict[int, str]
    small_from: int = 5000
    all_sizes_from: int = 9000
    small_words_from: int = 875
    all_words_from: int = 1875
    grow_every: int = 400
    open_from: int = 88_500

    def part(self, step: int, number: int) -> Part:
        """Return what the part has that is the `number`-th of the whole training, in a step."""
        begin = max(begin for begin in self.topics_from if begin <= step)
        names = self.topics_from[begin].split()
        name = names[number % len(names)]
        if begin >= self.open_from and not name.startswith("framed-"):
            topic = name.rstrip("123456")
            return Part(topic, WHOLE, int(name.removeprefix(topic) or 6), "open")
        name = name.removeprefix("framed-")
        topic = name.rstrip("123")
        stage = self.stage(topic, step)
        if name == topic:
            return Part(topic, stage, self.most_shapes(step))
        return Part(topic, min(stage, SMALL), int(name.removeprefix(topic)))

    def stage(self, topic: str, step: int) -> int:
        """Return START, SMALL or WHOLE."""
        if topic == "words":
            return START + (step >= self.small_words_from) + (step >= self.all_words_from)
        return START + (step >= self.small_from) + (step >= self.all_sizes_from)

    def most_shapes(self, step: int) -> int:
        return min(6, 1 + step // self.grow_every)


CURRICULUM = Curriculum(TOPICS_FROM)

# ------------------------------------------------------------------------------------ learning rate


@dataclass(frozen=True)
class Leg:
    """A warm-up and half a cosine: the share of the peak rate, and the step at which it is zero."""

    share: float
    end: float


LEGS = {  # from the step
    0: Leg(1.0, 20_000),
    20_000: Leg(0.6, 32_000),
    32_000: Leg(0.6, 50_000),
    46_500: Leg(0.3, 50_000),
    50_000: Leg(0.4, 65_000),
    65_000: Leg(0.15, 67_500),
    67_500: Leg(0.3, 74_500),
    74_500: Leg(0.25, 78_000),
    78_000: Leg(0.25, 80_500),
    79_500: Leg(0.3, 83_000),
    83_000: Leg(0.2, 85_500),
    85_500: Leg(0.2, 88_500),
    88_500: Leg(0.7, 93_000),
    93_000: Leg(0.6, 99_000),
    99_000: Leg(0.4, 100_000),
    100_000: Leg(0.6, 106_000),
    106_000: Leg(0.6, 114_800),
    114_800: Leg(0.6, 122_800),
    122_800: Leg(0.6, 128_000),
    128_000: Leg(0.6, 136_000),
    136_000: Leg(0.6, math.inf),
}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate of a step: for each of LEGS a short warm-up, then half a cosine to zero."""
    begin = max(begin for begin in LEGS if begin <= step)
    leg = LEGS[begin]
    length = min(steps, leg.end) - begin
    warm_up = min(1.0, (step - begin + 1) / min(200, 0.1 * length))
    cosine = (1 + math.cos(math.pi * (step - begin) / length)) / 2
    return peak * leg.share * warm_up * cosine
