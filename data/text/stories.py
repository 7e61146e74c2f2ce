"""Our own endless supply of simple children's stories: the training text that needs no network.

A story is an opening and one of `PLOTS`. A plot is a list of beats, a beat a list of alternative templates, and the
templates share one `Cast`: the names, things and places drawn once for the story, so that they stay the same in it.
The words are few and common, so that a very small model soon writes something that reads like a story. The form is
that of TinyStories (Eldan and Li 2023, arXiv:2305.07759); none of the text is.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
Row = dict[str, str]
Beat = list[list[str]]  # templates; each is the list of its variants


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of `items`. Only `random()` keeps its sequence over Python versions, so `choice` is not used."""
    return items[int(rng.random() * len(items))]


class Cast(dict[str, str]):
    """What fills the slots of one story. From `toy` it also makes `Toy` (capital) and `a_toy`, `A_toy` (article)."""

    def __missing__(self, slot: str) -> str:
        if slot[0].isupper():
            text = self[slot[0].lower() + slot[1:]]
            return text[0].upper() + text[1:]
        if slot.startswith("a_"):
            text = self[slot[2:]]
            return f"an {text}" if text[0] in "aeiou" else f"a {text}"
        raise KeyError(slot)


def rows(slots: str, text: str) -> list[Row]:
    """A table of things to draw from: entries are parted by `;` or a line end, the fields of an entry by ` / `."""
    names = slots.split()
    entries = [entry.strip() for entry in re.split(r"[;\n]", text) if entry.strip()]
    return [dict(zip(names, entry.split(" / "), strict=True)) for entry in entries]


def variants(template: str) -> list[str]:
    """All readings of a template: `a [big|small] dog` is `a big dog` and `a small dog`."""
    head, bracket, rest = template.partition("[")
    if not bracket:
        return [template]
    choices, _, tail = rest.partition("]")
    ends = variants(tail)
    return [head + choice + end for choice in choices.split("|") for end in ends]


def beats(text: str) -> list[Beat]:
    """Parses beats: a blank line parts two beats, `- ` at the start of a line begins one of a beat's templates."""
    return [
        [variants(" ".join(template.split())) for template in re.split(r"^- ", beat, flags=re.MULTILINE)[1:]]
        for beat in text.strip().split("\n\n")
    ]


@dataclass(frozen=True)
class Plot:
    """A shape of story: the tables it draws from beside the common ones, and its beats, one paragraph each."""

    props: Sequence[list[Row]]
    beats: list[Beat]
    animals: bool = True  # whether the hero may be an animal


PEOPLE = rows(
    "name kind he him his",
    "\n".join(
        f"{name} / {rest}"
        for rest, names in {
            "girl / she / her / her": """
                Lily Mia Anna Sue Lucy Sara Amy Emma Ella Molly Jane Kate Ruby Zoe Nora Lola Daisy Grace Mary Polly
                Ivy Eva Nina Tina Alice Holly Clara Bella Jill Penny Maya Rosie""",
            "boy / he / him / his": """
                Tim Tom Ben Max Sam Jack Leo Bob Finn Joe Dan Billy Pete Luke Adam Jim Noah Oscar Toby Henry Charlie
                Nick Paul Theo Fred Jake Ned Kevin Danny Oliver Peter Eli""",
        }.items()
        for name in names.split()
    ),
)
FRIENDS = [
    {"friend": row["name"], "fkind": row["kind"], "fhe": row["he"], "fhim": row["him"], "fhis": row["his"]}
    for row in PEOPLE
]
ANIMALS = rows("kind", "bear; rabbit; mouse; fox; pig; cat; monkey; elephant; lamb; squirrel")
ANIMAL_SHARE = 0.3  # of the stories whose plot allows it

# Drawn for every story, whether its plot uses them or not. A parent is twice as likely as a grandparent.
COMMON = [
    rows("parent phe phim phis", "mom / she / her / her; dad / he / him / his; grandma / she / her / her")
    + rows("parent phe phim phis", "mom / she / her / her; dad / he / him / his; grandpa / he / him / his"),
    rows("trait", "kind; happy; funny; smart; sweet; good; gentle; cheerful; friendly; clever; nice; curious"),
    rows("color", "red; blue; green; yellow; pink; orange; purple; white; brown"),
    rows("day", "one day; one sunny day; one morning; one bright morning; one afternoon; one warm day; on Sunday"),
    rows("hobby", "run and jump; sing songs; play outside; draw pictures; dance; look at books; pick flowers")
    + rows("hobby", "make people laugh; tell stories; play with friends; ask questions; count the stars; help at home"),
    rows("home", "in a small house by the woods; in a little red house; in a big house on a hill; on a farm")
    + rows("home", "in a house near the sea; in a small town; in a quiet village; in an old house by the river"),
    rows(
        "treat treats", "cookie / cookies; apple / apples; muffin / muffins; pear / pears; orange / oranges; bun / buns"
    ),
]

TOYS = rows("toy", "ball; doll; teddy bear; car; boat; train; drum; truck; top; robot; puzzle; kite")
PLAY_PLACES = rows(
    "place", "the park; the beach; the playground; the big field; the pond; the river; the lake; the school yard"
)

# About half of the stories begin with "Once upon a time": it is drawn first, then one of that list's openings.
ONCE_SHARE = 0.5
ONCE = beats("""
- Once upon a time, there was {a_trait} [little |]{kind} [named|called] {name}.
- Once upon a time, there lived {a_trait} {kind} [named|called] {name}.
- Once upon a time, {a_trait} [little |]{kind} [named|called] {name} lived {home}.
- Once upon a time, there was a [little|small|young] {kind} who loved to {hobby}. {His} name was {name}.
- Once upon a time, {home}, there lived a [little|small] {kind} [named|called] {name}.

- {He} loved to laugh and play[| all day| all day long].
- {name} lived with {his} {parent}, and they were very happy.
- {name} and {his} {parent} loved each other very much.
- {He} had a big smile and a [kind|good|warm] heart.
- {name} always had a smile on {his} face.
- Every [day|morning], {he} woke up with a smile.
""")
NOT_ONCE = beats("""
- {name} was {a_trait} [little |]{kind}.
- {name} was a [little|small] {kind} with a big heart.
- There was a [little|small|young] {kind} [named|called] {name}.
- {A_trait} [little |]{kind} [named|called] {name} lived with {his} {parent}.
- {name} was a [little|small] {kind} with a big smile.

- {He} loved to {hobby}.
- Every day, {he} liked to {hobby}.
- {His} favorite thing was to {hobby}.
- {He} lived {home}. {He} liked to {hobby}.
- [Most of all|More than anything], {he} loved to {hobby}.
""")

PLOTS: dict[str, Plot] = {}

PLOTS["lost and found"] = Plot(
    [
        TOYS,
        rows(
            "hidden first second",
            """
            under the bed / behind the door / in the big box
            in the tall grass / under the tree / behind the house
            behind the chair / under the table / on the bed
            under a blanket / in the kitchen / behind the door
            in the garden / under the bed / in the bath
            next to the pond / in the garden / under the bench
            behind a big rock / in the grass / by the gate
            under a bush / on the swing / behind the tree
            on the top shelf / in the toy box / under the chair
            in the dog's bed / under the table / behind the sofa
            """,
        ),
    ],
    beats("""
- {Day}, {name} wanted to play with {his} {color} {toy}. It was {his} favorite toy. But the {toy} was not in its
  place!
- {name} had {a_color} {toy}. {He} loved it very much and played with it [all the time|every day]. But {day}, {he}
  could not find it.
- {name} had a new {toy}. It was {color} and very pretty. {Day}, {name} woke up and the {toy} was gone.

- "Where is my {toy}?" asked {name}. {He} [felt very sad|wanted to cry|began to cry].
- "Oh no! My {toy} is gone!" [said|cried] {name}. A big tear ran down {his} face.
- {name} looked and looked, but {he} could not see the {toy}. "I [miss|want] my {toy}," {he} said[| in a small voice].

- {His} {parent} [came|ran] to help. "[Do not worry|Don't be sad|Don't cry]," said {Parent}. "We can look for it
  together."
- {His} friend {friend} came to the door. "Why are you sad?" asked {friend}. "I lost my {toy}," said {name}. "I will
  help you find it!" said {friend}.
- "[Do not worry|Don't be sad|Don't cry]," said {his} {parent}. "We will find it. I will help you look."

- They looked {first}, but the {toy} was not there. They looked {second}, but it was not there either.
- First they looked {first}. No {toy}! Then they looked {second}. Still no {toy}!
- They looked {first} and they looked {second}. They looked [everywhere|up and down], but they could not find the
  {toy}.

- Then {name} looked {hidden}. There it was! "I found it! I found it!" {he} [said|shouted|cried] and jumped up and
  down.
- At last, {name} saw something {color} {hidden}. "Look!" {he} [said|cried]. "It is my {toy}!"
- Then {name} had an idea. {He} went to look {hidden}. And there was the {color} {toy}!

- {name} [held|hugged] the {toy} and [smiled|laughed]. "Thank you for helping me!" {he} said. [That night, the {toy}
  slept next to {him}.|Then they all played together.|{He} was very happy.]
- {name} was so happy. From that day on, {he} always put {his} {toy} [back in its place|in the toy box] when {he} was
  done.
- "Thank you! I could not do it without you," said {name}. {He} played with the {toy} [until dinner|all day] and did
  not lose it again.
"""),
)

PLOTS["sharing food"] = Plot(
    [PLAY_PLACES],
    beats("""
- {Day}, {his} {parent} gave {him} a [bag|box|basket] of {treats}. {name} took the {treats} to {place}.
- {Day}, {name} got some {treats} from {his} {parent}. They smelled so good! {name} took them to {place}.
- {Day}, {name} went to {place} with a [bag|box|basket] full of {treats}. {He} was [very|so] hungry.

- {He} saw {his} friend {friend} there. {friend} had no food and looked sad. "I am hungry," said {friend}.
- {His} friend {friend} was there too. {friend} looked at the {treats}. "May I have one?" {fhe} asked.
- {His} friend {friend} sat all alone and looked at the ground. "What is wrong?" asked {name}. "I forgot my lunch,"
  said {friend}.

- {name} did not want to share at first. {He} wanted to eat all the {treats}. But then {he} saw {friend}'s sad face.
- {name} looked at the {treats}. There were not many. {He} thought about it for a [little|long] time.
- "But these are mine," thought {name}. Then {he} thought, "I would be sad too if I had no food."

- "Here," said {name}. "You can have {a_treat}. We can eat together!" {friend} [smiled|was so happy].
- {name} gave half of the {treats} to {friend}. "Thank you!" said {friend}. "You are a good friend."
- "Please take one," said {name}. {friend} took {a_treat} and ate it all up. "Yum!" {fhe} said.

- They sat [under a tree|in the sun|on the grass] and ate. The {treats} tasted [even |]better when they shared.
- Then {friend} had something to share too. It was a [cup|box] of [milk|juice|water]. They drank it and laughed.
- When all the {treats} were gone, they played [games|ball] and laughed [all day|until it was time to go home].

- {name} went home with a [big|happy] smile. {He} learned that it feels good to share.
- "Sharing is fun!" said {name}. {friend} said, "Next time, I will share with you."
- That night, {name} told {his} {parent} about it. "I am proud of you," said {Parent}. "You were very kind."
"""),
)

PLOTS["taking turns"] = Plot(
    [rows("ride use", "swing / go on the swing; slide / go down the slide; bike / ride the bike")],
    beats("""
- {Day}, {name} went to the park with {his} {parent}. There was a new [red|blue|yellow] {ride} in the park. {name} ran
  to it as fast as {he} could.
- {Day}, {name} saw a [big|new|shiny] {ride} at the playground. "Wow!" {he} said. "I want to {use}!"

- {name} played on the {ride} again and again. It was so much fun! Then a {fkind} named {friend} came. "Can I have a
  turn?" {fhe} asked.
- {name} got there first. {He} went fast and laughed. A {fkind} named {friend} stood and watched. "I want a turn too,"
  said {friend}.

- "No!" said {name}. "It is mine!" {friend} was sad and [walked away|sat down on the grass|began to cry].
- "No, I was here first," said {name}. {He} did not want to stop. {friend} looked down and did not say a word.

- {His} {parent} came over. "The {ride} is for everyone," said {Parent}. "How would you feel if you had to wait all
  day?"
- {His} {parent} saw this and said, "{name}, we take turns here. It is not nice to keep the {ride} for yourself."
- Then {name} looked at {friend}'s sad face. {He} did not feel good. The {ride} was not so much fun now.

- {name} thought about it. "I am sorry, {friend}," {he} said. "It is your turn now." {friend} [smiled|was very happy].
- {name} stopped and went to {friend}. "I was not nice," {he} said. "You can {use} now." "Thank you!" said {friend}.

- They took turns and [laughed|played] all [day|afternoon]. {name} learned that taking turns is [more fun|better] than
  playing alone.
- First {friend} had a turn, and then {name} had a turn. It was the best day. When the sun went down, they were good
  friends.
- "This is more fun with two!" said {name}. They played until it was time to go home[| for dinner].
"""),
)

PLOTS["a fear overcome"] = Plot(
    [
        rows(
            "fear dare dared",
            """
            the dark / go into the dark room / went into the dark room
            the big slide / go down the big slide / went down the big slide
            the water / jump into the water / jumped into the water
            the big dog next door / pet the big dog / put out a hand and petted the big dog
            the tall tree / climb the tall tree / climbed up the tall tree
            the old bridge / walk over the old bridge / walked over the old bridge
            the barn / go into the big barn / went into the big barn
            the high swing / go on the high swing / sat on the high swing and went up and down
            the big horse / sit on the big horse / sat on the big horse
            the dark cave / look into the dark cave / looked into the dark cave
            """,
        )
    ],
    beats("""
- But {name} had one [big |]problem. {He} was afraid of {fear}. {Day}, all of {his} friends wanted to {dare}.
- But there was one thing {name} did not like. {He} was [scared|afraid] of {fear}. {Day}, {his} friend {friend} said,
  "Let's {dare}!"
- {name} was not afraid of many things, but {he} was afraid of {fear}. {Day}, {his} friend {friend} asked {him} to
  {dare}.

- "I can't do it," said {name}. "I am too scared." {His} legs began to shake.
- {name} shook {his} head. "No, no!" {he} [said|cried]. "I am scared!" {He} wanted to run home.
- {name}'s heart went fast. {He} closed {his} eyes. "I do not want to," {he} said in a small voice.

- {His} {parent} took {him} by the hand. "It is okay to be scared," said {Parent}. "I was scared too when I was
  little."
- {His} {parent} gave {him} a hug. "Being brave does not mean you are not scared," said {Parent}. "It means you try."
- "Do not worry," said {his} friend {friend}. "I will stay with you. We can do it together."

- {name} took a big breath. One, two, three! {He} {dared}. Nothing bad happened!
- {name} thought for a [little|long] time. Then {he} stood up tall. Step by step, {he} did it. {He} {dared}!
- First {name} just looked. Then {he} came a little closer. And then, at last, {he} {dared}.

- "I did it!" [said|shouted|cried] {name}. "It was not scary at all. It was fun!" Everyone clapped.
- "Look at me!" {name} [shouted|said]. {He} laughed and laughed. "Can I do it again?"
- {name} opened {his} eyes and smiled. "That was [easy|fun]!" {he} said. "I want to do it again!"

- From that day on, {name} was not afraid of {fear}. {He} was [proud|happy] and brave.
- That night, {name} told {his} {parent} all about it. "You are very brave," said {Parent}, and {name} felt proud.
- {name} learned that a scary thing is not so scary when you try. {He} went home with a big smile.
"""),
    animals=False,
)

PLOTS["helping an animal"] = Plot(
    [
        rows(
            "animal trouble fix well bye",
            """
            bird / had a hurt wing / made a soft bed for it in a box / its wing was well / flew up into the sky
            kitten / was high up in a tree / got a long ladder and took it down / it was safe / licked {his} hand
            duck / had lost its mom / carried it back to the pond / its mom was there / swam away with its mom
            turtle / was on its back / turned it over very slowly / it could walk again / walked to the water
            puppy / was wet and cold / put a warm blanket on it / it was warm and dry / licked {his} face
            rabbit / had a hurt leg / put something soft on its leg / its leg was well / hopped back to the woods
            frog / was in a deep hole / put a long stick into the hole / it was out of the hole / jumped into the pond
            bee / had fallen into the water / held out a leaf / it was dry and safe / flew to a yellow flower
            fish / was in a very small pool / carried it to the river in a cup / it was in the deep water / swam away
            mouse / was stuck in a box / opened the box / it was free / ran back to its home
            lamb / could not get out of the mud / pulled it out of the mud / it was clean and dry / ran back to its mom
            owl / had a hurt foot / gave it food and a soft bed / its foot was well / flew up to a tall tree
            """,
        ),
        rows("path", "in the woods; by the river; in the garden; near the farm; by the pond; in the park"),
    ],
    beats("""
- {Day}, {name} went for a walk {path}. {He} heard a small sound. [What could it be?|{He} stopped to look.]
- {Day}, {name} and {his} {parent} were {path}. "Listen!" said {name}. "[Something|Someone] needs help."
- {Day}, {name} was playing {path}. Then {he} saw something small. It did not look happy.

- It was a little {animal}. The poor {animal} {trouble}. It looked very [sad|scared].
- {name} saw a little {animal}. It {trouble}. "Oh, poor little {animal}!" [said|cried] {name}.
- There was {a_animal}! It {trouble} and it was [scared|afraid]. {name} wanted to help.

- "Don't be afraid," said {name}. "I will help you." {He} called {his} {parent}, and {Parent} came to help.
- "{Parent}, {Parent}, come and see!" called {name}. "Can we help it?" "Yes, we can," said {his} {parent}. "But we
  must be very gentle."
- {name} did not know what to do. {He} ran to get {his} {parent}. "Please help the little {animal}!" {he} said.

- They {fix}. {name} was very [gentle|careful]. The {animal} was not afraid [of them |]now.
- Together, they {fix}. "Good job," said {Parent}. "You are so kind."
- They worked together. They {fix}. {name} [talked to|sang to] the {animal} in a soft voice.

- Soon, {well}. The {animal} looked at {name} as if to say thank you. Then it {bye}.
- After some time, {well}. "You are okay now!" said {name}. The {animal} {bye}.
- Then, at last, {well}. The {animal} was so happy! It {bye}.

- {name} was happy [too|to help]. {He} [waved and |]said, "Goodbye, little {animal}!"
- "I will miss you, little friend," said {name}. {His} {parent} gave {him} a hug. "You did a good thing today," {phe}
  said.
- From that day on, {name} always looked for animals that needed help. And the {animal} never forgot {him}.
"""),
    animals=False,
)

PLOTS["a mistake and an apology"] = Plot(
    [
        rows(
            "thing slip mess fix",
            """
            cup / The cup fell on the floor and broke / the broken cup / picked up all the pieces
            milk / The milk ran all over the floor / milk on the floor / cleaned the floor until it was dry
            pot / The pot fell down and broke / dirt on the floor / put the flower in a new pot
            lamp / The lamp fell down with a loud bang / the broken lamp / fixed the lamp with glue
            plate / The plate fell and broke in two / the broken plate / fixed the plate with glue
            paint / The paint fell on the floor / paint on the floor / washed the floor with water
            soup / The soup fell on the floor / soup on the floor / cleaned the floor and made new soup
            jar / The jar of jam fell and broke / jam on the floor / cleaned the floor until it was shiny
            """,
        )
    ],
    beats("""
- {Day}, {name} was playing [with a ball|a game] in the house. {His} {parent} said, "Please do not run in here." But
  {name} forgot and ran.
- {Day}, {name} was [running|jumping|dancing] in the kitchen. {He} did not look where {he} was going.
- {Day}, {name} wanted to help in the kitchen. But {he} went too fast and was not careful.

- Bump! {name} hit the table. {slip}. "Oh no!" said {name}.
- {name} did not see the {thing}. Bump! {slip}. [It was a big|What a] mess!
- Oops! {slip}. {name} stood very still. {He} looked at the {thing} and felt bad.

- {name} was scared. {He} wanted to hide. "Maybe {Parent} will be mad," {he} thought.
- {name} did not know what to do. {He} wanted to run away and say nothing. But that did not feel right.
- At first, {name} thought, "I can say the cat did it." But {he} knew it was not good to lie.

- Then {his} {parent} came in and saw {mess}. "What happened?" {phe} asked.
- {His} {parent} came into the room and saw {mess}. "Who did this?" asked {Parent}.

- "It was me," said {name}. "I am [so|very] sorry. I did not mean to do it." A tear ran down {his} face.
- {name} looked down. "I did it," {he} said. "I was not careful. I am sorry, {Parent}."

- {His} {parent} was not mad. "Thank you for telling me the truth," {phe} said. "We can clean it up together." [And so
  they did.|So they got to work.] They {fix}.
- {Parent} gave {name} a hug. "[Everyone makes mistakes|It was a mistake]," {phe} said. "I am proud that you told the
  truth." Together, they {fix}.

- {name} felt much better. From that day on, {he} was [more careful|careful in the house].
- {name} learned that it is [good|best|always better] to tell the truth and say sorry.
- "Next time, I will be careful," said {name}. {Parent} smiled and gave {him} {a_treat}.
"""),
    animals=False,
)

PLOTS["a birthday surprise"] = Plot(
    [TOYS],
    beats("""
- It was {name}'s birthday. {He} woke up early and ran to the kitchen. But no one was there!
- Today was a special day. It was {name}'s birthday! But when {he} woke up, the house was very quiet.
- {name} was very happy because it was {his} birthday. But no one said a word about it.

- "{Parent}, do you know what day it is?" asked {name}. "It is a nice day," said {his} {parent}, and went back to
  work.
- {He} went to see {his} friend {friend}. "Do you want to play?" {name} asked. "I can't play today," said {friend}. "I
  have to go!"
- {name} waited and waited. No one came to play with {him}. No one sang a song.

- {name} felt [sad|very sad|alone]. {He} sat [under a tree|on the steps|on {his} bed]. "Maybe they all forgot," {he}
  thought.
- {name} went for a walk alone. "No one remembers my birthday," {he} said, and {he} wanted to cry.

- Then {Parent} called, "{name}! Come here, please!" {name} walked [slowly |]into the [garden|kitchen|yard].
- After some time, {he} heard {his} {parent} call {his} name. {name} opened the door. It was dark inside.
- When the sun was low, {name} went back to the kitchen. {He} opened the door and looked inside.

- "Surprise!" everyone shouted. {His} friend {friend} was there, and {Parent}, and all the others! There was a big
  [cake|cake on the table].
- "Happy birthday, {name}!" they all shouted. There were {color} balloons everywhere. {His} friend {friend} was there
  and gave {him} a big hug.

- {friend} gave {name} a box. Inside was a new {toy}! "[I love it|Thank you]!" said {name}. "You did not forget!"
- {name} got {a_color} {toy} from {his} {parent}. {He} jumped up and down. "It is just what I wanted!" {he} said.

- They sang and danced and ate cake. It was the best birthday ever.
- {name} laughed and hugged {his} {parent}. "This is the best surprise!" {he} said.
- That night, {name} went to bed with the new {toy} and a big smile. {He} knew that {he} was loved.
"""),
)

PLOTS["building something"] = Plot(
    [
        rows(
            "work parts fall better",
            """
            tower / blocks / it fell down with a crash / put the big blocks at the bottom
            sand castle / sand and water / the water washed it away / made a new one far from the water
            bird house / wood and nails / the roof fell off / used more nails for the roof
            tent / sticks and a blanket / the wind blew it over / tied it to a tree
            boat / wood and paper / it filled with water / used more wood and less paper
            kite / paper and sticks / it fell from the sky / gave it a long tail
            bridge / sticks and rocks / it fell into the water / put big rocks on both sides
            robot / boxes and paint / its head fell off / used a lot of glue
            dog house / wood and {color} paint / one wall fell down / made the walls strong
            train / boxes and string / the boxes came apart / tied the boxes with more string
            """,
        )
    ],
    beats("""
- {Day}, {name} had [an|a big] idea. "I want to make {a_work}!" {he} said.
- {Day}, {name} saw a picture of {a_work} in a book. "I can make one too," {he} said.
- {Day}, {name} had nothing to do. {He} thought and thought. "I know!" {he} said. "I will make {a_work}!"

- {name} got {parts}. {His} friend {friend} came to help. They worked and worked [all morning|for a long time].
- {name} asked {his} friend {friend} to help. They found {parts}. Soon, the {work} was [ready|almost done].
- {name} and {his} friend {friend} got {parts}. Then they began to work. It was hard, but it was fun.

- But then {fall}! "Oh no!" cried {friend}. "Now we have to start again."
- They stood back to look at the {work}. Then {fall}. {name} was [sad|mad|very sad].
- "Look, it is done!" said {name}. But then {fall}. They did not know what to do.

- "I give up," said {name}. But {his} {parent} said, "Don't stop now. [Think and try again|You can try a new way]."
- "Do not be sad," said {friend}. "We can try [again|one more time]. I know we can do it."
- {name} thought and thought. "I know what to do!" {he} said. "We can make it better."

- So they tried again. This time, they {better}. It worked!
- They went back to work. They {better}. Now the {work} was [good and strong|even better].
- This time, they were careful. They {better}, and the {work} was just right.

- "[We did it|Hooray|Look what we made]!" they shouted. {His} {parent} came to see it. "What a [great|good|pretty]
  {work}!" said {Parent}.
- {name} and {friend} were [so|very] proud. They looked at the {work} again and again.
- {name} learned that when something goes wrong, you can try again. And it is better with a friend.
"""),
)

PLOTS["learning a skill"] = Plot(
    [
        rows(
            "skill oops done",
            """
            ride a bike / {he} fell off the bike / rode the bike all the way down the road
            swim / {he} got water in {his} nose / swam from one side of the pool to the other
            climb a rope / {he} fell down on the grass / climbed to the top of the rope
            jump rope / {he} fell over the rope / jumped ten times and did not stop
            fly a kite / the kite fell to the ground / made the kite fly high in the sky
            catch a ball / the ball fell to the ground / put out both hands and caught the ball
            read / the words were too hard / read a whole page of the book
            write / the letters were all wrong / wrote {his} own name
            play the drum / the drum was too loud / played a fine song on the drum
            make pancakes / the pancake fell on the floor / made a big plate of pancakes
            """,
        )
    ],
    beats("""
- {name} wanted to learn to {skill}. {His} friend {friend} could do it very well. {Day}, {name} said, "I want to do it
  too!"
- {Day}, {name} saw {his} friend {friend} {skill}. It looked like so much fun. "I want to learn how to {skill}," said
  {name}.
- There was one thing {name} could not do yet. {He} could not {skill}. {Day}, {he} asked {his} {parent} for help.

- {name} tried, but {oops}. "Oh no!" {he} said. {He} felt [sad|mad].
- {name} tried once, but {oops}. {He} tried again, and it was not any better.
- The first time, {oops}. The next time, it was just the same. {name} was [sad|mad].

- "It is too hard!" {he} [said|cried]. "I [can't do it|will never learn]."
- "I can't do it," said {name}, and {he} sat down. {He} wanted to stop and go home.

- "You can do it," said {his} {parent}. "You just have to [try again|keep trying]. I will help you."
- {His} friend {friend} sat down next to {him}. "I could not do it at first," said {friend}. "I had to try many, many
  times."
- {His} {parent} smiled. "No one can do it the first time," said {Parent}. "Try a little every day."

- So {name} tried every day. {He} tried in the morning and {he} tried at night. And then, one day, {he} {done}!
- {name} tried again and again. It was hard, but {he} did not give up. At last, {he} {done}!
- The next day, {name} tried one more time. {He} went slowly and was careful. And then {he} {done}!

- "I did it! I did it!" [said|shouted|cried] {name}. Everyone clapped. {name} was so proud.
- "Look, {Parent}! I can {skill}!" {he} [said|shouted]. "I knew you could do it," said {his} {parent}.
- {name} was very [happy|proud]. {He} learned that you can do hard things if you do not give up.
"""),
    animals=False,
)

PLOTS["a rainy day"] = Plot(
    [
        rows(
            "game gaming",
            """
            make a tent with a blanket / sat in the tent and told stories
            play hide and seek / hid in every room of the house
            make paper boats / made ten little paper boats
            draw a big picture / drew the sun and a house and a tree
            play ship on the sofa / went on a long trip over the sea
            bake a cake / made a big cake with jam on it
            build a tall tower / put block on top of block
            put on a show / sang songs and danced around the room
            """,
        )
    ],
    beats("""
- One day, it [rained and rained|was raining]. {name} looked out of the window. {He} wanted to go outside to play.
- One morning, {name} woke up and heard the rain. Drip, drop, drip, drop! The sky was [gray|dark].
- {name} wanted to go to the park. But big, dark clouds came, and it began to rain.

- "Oh no," said {name}. "I can't play outside. There is nothing to do." {He} was [sad|mad].
- "Rain, rain, go away!" said {name}. But the rain did not stop. {name} sat by the window with a sad face.

- {His} {parent} had an idea. "We can have fun inside too," said {Parent}. "Let's {game}!"
- Then {his} friend {friend} came to the door in {fhis} {color} coat. "I know what we can do," said {friend}. "Let's
  {game}!"
- "Don't be sad," said {his} {parent}. "Rain is good for the flowers. Do you want to {game}?"

- "Yes!" said {name}. They {gaming}. They laughed so much that they forgot the rain.
- So that is what they did. They {gaming}. It was [warm and nice|so much fun].
- {name} liked that. They {gaming}, and soon {name} was not sad at all.

- Then the rain stopped. "Look!" said {name}. There was a big rainbow in the sky. It was so pretty!
- After some time, the sun came out. {name} put on {his} boots and ran outside. Splash! {He} jumped in every puddle.
- When the rain was over, they went outside. There were puddles everywhere. They jumped and got very wet.

- "I like rainy days," said {name}. "They are fun too!" And {he} [smiled|laughed].
- That night, {name} heard the rain again. Drip, drop, drip, drop. {He} smiled and went to sleep.
- {name} learned that you can have fun on any day[| if you try].
"""),
)

PLOTS["a new friend"] = Plot(
    [PLAY_PLACES, TOYS],
    beats("""
- {Day}, {name} went to {place}. There was someone new there. It was a {fkind} named {friend}.
- {Day}, {name} saw a new {fkind} at {place}. {name} had never seen {fhim} before.
- {Day}, a new family came to live next door. They had a little {fkind} named {friend}. {name} saw {fhim} at {place}.

- The new {fkind} sat all alone and did not talk to anyone. {name} thought that {fhe} looked sad.
- No one played with the new {fkind}. {name} wanted to say hello, but {he} was shy.
- The new {fkind} stood by a tree and watched. "Maybe that {fkind} needs a friend," thought {name}.

- {name} walked up and said, "Hello! My name is {name}. [What is your name|Who are you]?" "I am {friend}," said the
  new {fkind} in a small voice.
- "Hi!" said {name}. "I am {name}. Do you want to play with me?" The new {fkind} looked up. "Yes, please! I am
  {friend}."

- "I have {a_color} {toy}," said {name}. "You can play with it too." {friend} [smiled|smiled for the first time].
- {name} showed {friend} {his} {color} {toy}. "Wow!" said {friend}. "I like it! Can we play with it together?"
- "Do you like my {toy}?" asked {name}. "Yes," said {friend}. "I have one too, but mine is old."

- They played [all day|all afternoon|until the sun went down]. They ran and [laughed|jumped] and had so much fun.
- They played with the {toy}, and then they played hide and seek. {friend} was very good at it!
- Soon they laughed and talked as if they had been friends for a long time. They shared {a_treat} too.

- "Will you come back tomorrow?" asked {friend}. "Yes!" said {name}. From that day on, they were [best|good] friends.
- When it was time to go home, {friend} said, "Thank you for playing with me. You are my first friend here." {name}
  gave {fhim} a hug.
- {name} ran home and said, "{Parent}, I have a new friend!" {His} {parent} smiled. "It is good to be kind," {phe}
  said.
"""),
    animals=False,
)

PLOTS["bedtime"] = Plot(
    [
        rows(
            "noise source",
            """
            tap, tap, tap / a branch at the window
            buzz, buzz, buzz / a fly at the window
            hoo, hoo, hoo / an old owl in the tree
            drip, drip, drip / the water in the bath
            pat, pat, pat / the rain on the roof
            """,
        ),
        rows("cuddly", "teddy bear; doll; blanket; toy rabbit; toy dog"),
    ],
    beats("""
- It was night, and the [moon was|stars were] in the sky. "It is time for bed," said {his} {parent}. But {name} was
  not sleepy.
- One night, {name} did not want to go to bed. "I want to play [more|some more]," {he} said. "No, it is late," said
  {his} {parent}.
- One night, {name} was in bed with {his} {color} {cuddly}. {He} closed {his} eyes, but {he} could not sleep.

- {name} turned to one side. Then {he} turned to the other side. Then {he} heard something. {Noise}!
- The room was dark and quiet. Then {name} heard a sound. {Noise}! {He} hid under the blanket.
- {name} counted to ten. {He} was still awake. And then there was a sound. {Noise}!

- "{Parent}! {Parent}!" called {name}. "There is [something|a monster] in my room!" {His} {parent} came [fast|with a
  light].
- {name} was scared. {He} held {his} {cuddly} and called for {his} {parent}. {Parent} came into the room. "What is
  that sound?" asked {name}.

- They listened together. {Noise}! {Parent} looked and laughed. "It is only {source}," {phe} said.
- {name} and {Parent} went to look together. It was just {source}! {name} laughed and went back to bed.

- "Can you [read me a story|sing me a song]?" asked {name}. "Yes," said {Parent}. {Phe} sat on the bed, and {name}
  listened.
- {Parent} sat down on the bed and told {name} a story about [a brave bear|a little star|the moon]. It was a good
  story.
- {Parent} sang a soft song about [the moon|the stars|a little boat]. {name}'s eyes began to close.

- "Good night, {name}," said {Parent}. "I love you." "I love you too," said {name}, and soon {he} was asleep.
- {name} hugged {his} {cuddly}. {Parent} gave {him} a kiss and turned off the light. {name} slept all night and had
  sweet dreams.
- Soon {name} was [asleep|fast asleep]. {He} dreamed of [the stars|the moon|the sea]. And the moon looked in at the
  window.
"""),
)

PLOTS["a quarrel and making up"] = Plot(
    [rows("toy", "boat; car; train; kite; drum; robot; truck; doll"), PLAY_PLACES],
    beats("""
- {name} had a best friend named {friend}. They played together every day. {Day}, they found {a_color} {toy} in a box.
- {Day}, {name} and {his} best friend {friend} were playing at home. They both wanted to play with the {color} {toy}.
- {friend} was {name}'s best friend. {Day}, they played with {name}'s new {toy}. It was big and {color}.

- "I want it first!" said {name}. "No, I want it first!" said {friend}. They both [pulled and pulled|pulled at the
  {toy}].
- {friend} took the {toy}. "Give it back!" shouted {name}. "No! It is my turn!" said {friend}. They both got very mad.

- Snap! The {toy} broke. "[Look what you did|It is all because of you]!" said {name}. {friend} was mad and went home.
- The {toy} fell down and broke. They were both sad. "I do not want to play with you!" said {friend}, and {fhe} ran
  home.

- {name} sat alone in {his} room. It was too quiet. {He} missed {his} friend. {He} was not mad now. {He} was sad.
- The next day, {name} went to {place} alone. But it was not fun. "I miss {friend}," {he} thought.
- "A friend is better than a toy," said {his} {parent}. {name} thought about it. {He} knew that {he} had not been
  nice.

- So {name} went to {friend}'s house. "I am sorry," {he} said. "I was not nice to you." "I am sorry too," said
  {friend}.
- {name} made a [card|picture] for {friend}. It said, "I am sorry." When {friend} saw it, {fhe} smiled. "I am sorry
  too," {fhe} said.

- They [hugged|gave each other a big hug] and went to fix the {toy}. Soon it was [as good as new|like new].
- {name}'s {parent} helped them fix the {toy}. Then they took turns, and no one was mad.

- {name} and {friend} were best friends again. They never [fought over a toy|got so mad] again.
- They learned that it is good to say sorry. They played and laughed until [dinner|the sun went down].
- "You are more important than any toy," said {name}. And they were happy.
"""),
)

PLOTS["planting a seed"] = Plot(
    [
        rows(
            "plant plants",
            """
            sunflower / It was big and yellow
            apple tree / It had red apples on it
            tomato plant / It had round red tomatoes on it
            red flower / It smelled so sweet
            bean plant / It had long green beans on it
            pumpkin / It was big and round and orange
            carrot / It was long and orange
            blue flower / It was as blue as the sky
            white flower / It was as white as snow
            pear tree / It had sweet yellow pears on it
            """,
        )
    ],
    beats("""
- {Day}, {name} found a [small|tiny|little] seed. "What is this?" {he} asked. "It is a seed," said {his} {parent}.
  "Let's plant it."
- {Day}, {his} {parent} gave {name} a [small|tiny|little] seed. "If you take care of it, it will grow," {phe} said.
- {Day}, {name} saw a [small|tiny|little] seed on the ground. {He} picked it up and showed it to {his} {parent}.

- They went to the garden. {name} made a hole in the ground and put the seed in it. Then {he} gave it some water.
- {name} dug a small hole in the dirt. {He} put the seed in and covered it up. "Good night, little seed," {he} said.

- The next day, {name} ran to look. There was nothing! "Where is my plant?" {he} asked. "You have to wait," said
  {Parent}.
- Every day, {name} looked at the ground. But nothing came up. "It does not work," {he} said. "Wait a little," said
  {Parent}. "It needs time."
- {name} waited one day. {He} waited two days. {He} waited three days. "Why does it take so long?" {he} asked.

- {name} did not give up. {He} gave the seed water every morning. The sun was warm, and the rain came too.
- So {name} waited. Every day, {he} gave it water and sang it a [little|happy] song.

- Then, one morning, {name} saw something green. "Look, {Parent}!" {he} shouted. "It is growing!"
- And then, one day, a little green leaf came up. {name} jumped [up and down|with joy]. "It is here!" {he} cried.

- The plant grew and grew. At last, it was a fine {plant}. {plants}. {name} was so proud.
- Day by day, it got bigger. Then it was a real {plant}. {plants}. "You did it," said {his} {parent}.

- {name} learned that good things take time. {He} gave {his} friend {friend} some seeds too.
- "Thank you for growing," said {name}. And the next day, {he} planted [one more seed|ten more seeds].
- {name} smiled. "It was worth the wait," {he} said.
"""),
)

PLOTS["a market trip"] = Plot(
    [
        rows("buy buys", "milk and eggs / some milk; bread and cheese / some bread; apples and pears / a bag of apples")
        + rows(
            "buy buys", "fish and beans / a big fish; carrots and corn / some carrots; rice and jam / a bag of rice"
        ),
        rows("wares", "red apples; fresh bread; pretty flowers; yellow corn; shiny fish; big pumpkins; sweet cakes")
        + rows("wares", "{color} hats; toy trains; little chicks; {color} balloons"),
    ],
    beats("""
- {Day}, {name} went to the market with {his} {parent}. "We need {buy}," said {Parent}.
- {Day}, {his} {parent} said, "Come, {name}. Let's go to the market. We have to buy {buy}." {name} was [very
  happy|glad].

- The market was big and loud. There were {wares} and many people. {name} looked at everything.
- There was so much to see! There were {wares}, and a man sang a funny song. {name} stopped to look.

- {Parent} bought {buys}. But when {name} turned around, {Parent} was not there! {name} was lost. {He} was scared.
- Then {name} looked up. {Parent} was gone! There were so many people, and {name} could not see {his} {parent}.

- {name} remembered what {Parent} told {him}. "If you get lost, stay where you are." So {he} stood still and waited.
- A [nice|kind] woman saw {him}. "Are you lost?" she asked. "Yes," said {name}. The woman waited with {him}.
- A man with a big hat saw {him}. "Are you lost?" he asked. "Yes," said {name}. "Do not be afraid," said the man.
- {name} wanted to cry. But {he} was brave. {He} stood on a box and called, "{Parent}! {Parent}! I am here!"

- Soon {name} heard a voice. "{name}! There you are!" It was {Parent}! {Phe} ran to {name} and hugged {him}.
- Then {name} saw {Parent}. {Parent} had {a_color} coat on. {name} ran to {phim} and held {phim} [tight|very tight].

- "I am glad that I found you," said {Parent}. "Please hold my hand now." And {name} did.
- "I am sorry that I stopped," said {name}. "I will stay with you now." {Parent} smiled. "You did well," {phe} said.

- They bought {a_treat} to share and went home. {name} held {Parent}'s hand all the way.
- On the way home, {name} carried the bag. {He} was happy to be with {his} {parent}.
- They went home and made a good dinner. "It is nice to be home," said {name}.
"""),
    animals=False,
)

PLOTS["a snow day"] = Plot(
    [rows("nose", "a carrot; an orange; a small stick; a red button"), rows("wear", "hat; scarf")],
    beats("""
- One morning, {name} looked out of the window. Everything was white! "It snowed!" {he} [said|shouted|cried].
- It was winter, and it was very cold. One night, the snow came down and down. In the morning, {name} was so happy.

- {name} put on {his} boots and {his} {color} {wear} and ran outside. {His} friend {friend} was there too. "Let's make
  a snowman!" said {friend}.
- {He} put on a warm {color} {wear} and went outside with {his} friend {friend}. The snow was cold and soft. "I want
  to make a snowman!" said {name}.

- First they made a big ball. Then they made a small ball for the head. But the head was too heavy to [lift|pick up].
- They rolled the snow into a big, big ball. They pushed and pushed, but it did not move. "It is too heavy," said
  {friend}.

- "Let's ask {Parent} for help," said {name}. {His} {parent} came out, and they all pushed together. One, two, three,
  up!
- "We can do it together," said {name}. {His} {parent} helped too. They counted to three, and up it went!

- They used {nose} for the nose and two [rocks|buttons] for the eyes. {name} gave the snowman {his} {wear}. Now he was
  done!
- "He needs a nose," said {friend}. They found {nose} for the nose. {name} put {his} {color} {wear} on the snowman.

- The snowman was very [big|tall|funny]. "Hello, snowman!" said {name}. They all danced around him and laughed.
- They stood and looked at the snowman. "I think he is smiling at us," said {friend}.

- Then they went inside and drank hot milk. It was a good day.
- When it got dark, they were cold and happy. {Parent} gave them [hot soup|hot milk] and {treats}.
- That night, {name} looked out of the window. "Good night, snowman," {he} said. "See you tomorrow."
"""),
)

PLOTS["baking"] = Plot(
    [
        rows("baked", "cake; pie; pizza; apple pie; honey cake; pumpkin pie"),
        rows(
            "oops fix",
            """
            there were no more eggs / went next door and asked for some eggs
            the bag of flour fell down / cleaned the floor and started again
            it got too hot and turned black / made a new one and watched it all the time
            there was too much salt in it / started again with less salt
            they could not find the milk / went to the shop and got some milk
            the bowl fell on the floor / got a new bowl and started again
            """,
        ),
        rows(
            "guest", "{his} friend {friend}; a sick friend; the new teacher; the man next door; the old woman next door"
        ),
    ],
    beats("""
- {Day}, {name} wanted to make {a_baked} for {guest}. {He} asked {his} {parent} for help. "Of course," said {Parent}.
- {Day}, {his} {parent} was in the kitchen. "What are you doing?" asked {name}. "I am making {a_baked} for {guest},"
  said {Parent}. "Do you want to help?" "Yes, please!" said {name}.

- {name} washed {his} hands and got a big bowl. {Parent} showed {him} what to do. {He} mixed and mixed.
- They put everything into a big bowl. {name} mixed it with a big spoon. {He} had flour on {his} nose, and {Parent}
  laughed.

- But then something went wrong. {Oops}! "Oh no! What can we do now?" asked {name}.
- It was going well. But then {oops}. {name} was [sad|very sad].

- "It is okay," said {Parent}. "We can try again." So they {fix}.
- "Do not worry," said {his} {parent}. "This happens to everyone." They {fix}.

- Soon the kitchen smelled so good. {name} looked and looked. "Is it done?" {he} asked. "Yes, now it is done," said
  {Parent}.
- Then they waited. It was hard to wait! At last, {Parent} took it out. It was big and brown and [warm|perfect].

- They took the {baked} to {guest}. "For me? Thank you!" was the answer. "It looks so good!"
- {name} carried the {baked} with both hands and gave it to {guest}. "We made it for you," {he} said.

- They all sat down and ate together. {name} was so proud.
- {name} smiled all the way home. {He} learned that it is nice to make something for others.
- "Can we make one more tomorrow?" asked {name}. {Parent} laughed and said yes.
"""),
    animals=False,
)

PLOTS["a sick friend"] = Plot(
    [
        rows("gift", "a picture of a rainbow; a pretty card; some {color} flowers; some hot soup; a book about animals")
        + rows("gift", "a funny hat; a {size} balloon; a basket of {treats}; a soft toy; a jar of honey"),
        rows("size", "big; round; small"),
    ],
    beats("""
- {Day}, {name} went to play with {his} friend {friend}. But {friend} was not outside. {friend} was sick in bed.
- {Day}, {name} waited for {his} friend {friend} at the gate. But {friend} did not come. "{friend} is sick today,"
  said {his} {parent}.

- "Poor {friend}," said {name}. "[I want to help.|What can I do?]" {He} thought and thought.
- {name} was sad. It was no fun to play alone. "I want {friend} to feel better," {he} said.

- "I know!" {he} said. "I will bring {friend} {gift}." {His} {parent} said, "That is a very kind idea."
- "When I am sick, I like to get something nice," said {name}. So {he} and {his} {parent} got {gift} for {friend}.

- {name} walked to {friend}'s house. {He} was very careful. {He} knocked on the door. Knock, knock, knock!
- {name} ran all the way to {friend}'s house. {He} went in on quiet feet and opened the door of {friend}'s room.

- {friend} was in bed and looked [sad|tired]. "I have something for you," said {name}. It was {gift}! {friend} sat up
  and smiled.
- "Hello, {friend}," said {name}. "This is for you." When {friend} saw it, {fhe} began to smile. "Thank you!" {fhe}
  said.

- {name} sat next to the bed and told {friend} a funny story. They both laughed. "I feel better now," said {friend}.
- Then {name} sang a song for {friend}. {friend} closed {fhis} eyes and slept. {name} went home on quiet feet.

- The next day, {friend} was well again. They ran and played in the sun. "You are the best friend," said {friend}.
- After three days, {friend} was well. {Fhe} came to {name}'s door and said, "Let's play!"
- {name} learned that a little kindness can make someone feel [much |]better.
"""),
)

PLOTS["lost in the woods"] = Plot(
    [
        rows(
            "chase guide lead",
            """
            butterfly / owl / flew from tree to tree
            rabbit / bird / flew in front of {him}
            frog / duck / walked in front of {him}
            squirrel / deer / went slowly down the path
            blue bird / bear / showed {him} the way
            yellow leaf / fox / ran in front of {him}
            """,
        ),
        rows("tasty", "berries; nuts; flowers"),
    ],
    beats("""
- {Day}, {name} went into the woods to look for {tasty}. "Do not go too far," said {his} {parent}.
- {Day}, {name} was walking in the woods with {his} {parent}. The trees were tall and green.

- Then {name} saw {a_chase}. It was so pretty! {name} ran after the {chase}. {He} ran and ran and did not look back.
- {name} saw {a_chase}. "Wait for me!" {he} called. {He} ran after it, over the rocks and under the trees.

- Soon the {chase} was gone. {name} looked around. {He} did not know where {he} was. "I am lost," {he} said.
- When {name} stopped, everything looked new. It was getting dark. "Where am I? How do I get home?" {he} cried.

- {name} sat down and began to cry. Then {he} heard a kind voice. It was {a_guide}! "Why are you sad?" asked the
  {guide}.
- Then {a_guide} came out from behind a tree. "Hello, little one," said the {guide}. "Are you lost?" "Yes," said
  {name}.

- "I want to go home," said {name}. "I know the way," said the {guide}. "Come with me." And the {guide} {lead}.
- "Please help me," said {name}. "Do not be afraid," said the {guide}. "I will take you home." The {guide} {lead}.

- They went [over a hill|past a pond|over a little bridge] and [through the tall grass|past a big rock]. Then {name}
  saw a light. It was {his} house!
- They walked and walked. Soon {name} heard {his} {parent} call {his} name. "I am here!" shouted {name}.

- {His} {parent} ran to {him} and hugged {him}. "I was so worried," said {Parent}. {name} said, "I am sorry. I will
  not run away again."
- "Thank you, {guide}!" said {name}. {He} was so happy to be home. {He} never went too far again.
- {Parent} thanked the {guide} and gave it some food. From that day on, {name} and the {guide} were friends.
"""),
    animals=False,
)

PLOTS["too many sweets"] = Plot(
    [rows("sweet", "cookies; cakes; pies; sweet buns; muffins"), rows("keep", "jar; box; bowl; basket")],
    beats("""
- {Day}, {his} {parent} made a lot of {sweet}. {Phe} put them in a big {keep}. "You may have one," said {Parent}. "The
  rest are for the party."
- {Day}, {name} saw a big {keep} in the kitchen. It was full of {sweet}. "They are for after dinner," said {his}
  {parent}. "You can have one now."

- {name} ate one. It was so good! Then {he} looked at the {keep} again. "One more will not be bad," {he} thought.
- When {Parent} went out of the room, {name} looked at the {keep}. {He} wanted more. "No one will know," {he} thought.

- {He} ate one more. Then {he} ate two more. Then {he} ate and ate until the {keep} was empty.
- So {he} took one more, and one more, and one more. Soon all the {sweet} were gone!

- Then {name} did not feel good. "Oh, my tummy hurts!" {he} [said|cried]. {He} had to lie down.
- But then {his} tummy began to hurt. It hurt so much that {name} sat down on the floor and cried.

- {His} {parent} came in and saw the empty {keep}. "Did you eat them all?" {phe} asked. "Yes," said {name}. "I am
  sorry."
- "What is wrong, {name}?" asked {Parent}. {name} told {phim} the truth. "I ate all the {sweet}. I am so sorry."

- {Parent} gave {him} some water and sat next to {him}. "Too much of a good thing is not good," {phe} said. Soon
  {name} felt better.
- {Parent} was not happy, but {phe} gave {name} a hug. "Now you know why I said one," {phe} said. {name} slept, and
  then {he} was well again.

- The next day, {name} helped {Parent} make more {sweet}. This time, {he} ate only one and gave the rest to {his}
  friends.
- {name} learned to listen to {his} {parent}. After that, {he} always shared {his} {sweet}.
- From that day on, one was enough for {name}.
"""),
)

PLOTS["doing the right thing"] = Plot(
    [
        rows("found", "hat; bag; key; watch; shoe; coat; book"),
        rows("owner ohe", "old man / he; old woman / she; tall man / he; young woman / she"),
        rows("spot", "on the road; under a bench; on the path; in the grass; by the gate; on the stairs"),
    ],
    beats("""
- {Day}, {name} was walking home. Then {he} saw something {spot}. It was {a_color} {found}!
- {Day}, {name} and {his} friend {friend} were playing outside. "Look!" said {name}. There was {a_color} {found}
  {spot}.

- {name} picked it up. It was very nice. "I want to keep it," {he} thought. "I found it, so it is mine."
- "It is so pretty," said {name}. {He} looked all around. There was no one there. "Maybe I can keep it."

- But then {name} thought of the one who lost it. "Someone must be very sad now," {he} said.
- {name} took it home and showed it to {his} {parent}. "It is not ours," said {Parent}. "How would you feel if you
  lost your {found}?"

- So {name} went from door to door. "Is this your {found}?" {he} asked. "No, it is not mine," they all said.
- {name} wanted to find the owner. {He} asked the teacher. {He} asked the man at the shop. No one knew.

- Then {name} saw {a_owner}. {Ohe} was looking for something on the ground. "Did you lose {a_color} {found}?" asked
  {name}.
- At last, {he} met {a_owner}. {Ohe} looked sad. "I lost my {color} {found}," {ohe} said. "Is it this one?" asked
  {name}.

- "Yes! That is my {found}!" said the {owner}. "Thank you so much! You are a good {kind}." {Ohe} gave {name}
  {a_treat}.
- The {owner} was so happy that {ohe} began to cry. "Thank you! My mom gave it to me a long time ago," {ohe} said.

- {name} went home with a warm feeling in {his} heart. {He} was glad that {he} did the right thing.
- {name} was happy too. {His} {parent} was very proud of {him}.
- {name} learned that it feels good to be honest. And {he} and the {owner} were friends from that day on.
"""),
    animals=False,
)

PLOTS["a race"] = Plot(
    [
        rows("goal", "the big tree; the river; the red gate; the old bridge; the top of the hill; the pond"),
    ],
    beats("""
- {Day}, there was a race. Everyone had to run to {goal}. {name} wanted to win more than anything.
- {Day}, {his} {parent} said, "Let's have a race! Who can run to {goal} first?" "I can!" said {name}. All {his}
  friends came too.

- "One, two, three, go!" they shouted. {name} was in front, and {his} friend {friend} was right behind {him}.
- Everyone stood in a line. Then they ran! {His} friend {friend} was fast, but {name} was even faster.

- Then {name} heard a cry. {He} looked back. {friend} was on the ground. {Fhe} had hurt {fhis} leg.
- But then {friend} fell over a [rock|stick]. "Ouch!" cried {friend}. {name} heard it and turned around.

- {name} could see {goal}. {He} could win! But {he} did not want to leave {friend} alone. So {he} stopped and ran
  back.
- "What should I do?" thought {name}. {He} wanted to win, but {friend} needed help. {name} went back to {fhim}.

- "Are you okay?" asked {name}. "My leg hurts," said {friend}. "Hold on to me," said {name}. "We can go together."
- {name} helped {friend} up. "But now you will not win," said {friend}. "That is okay," said {name}. "You are my
  friend."

- Step by step, they walked to {goal}. They were the last ones, but everyone clapped and shouted.
- They came to {goal} last. But all the others were waiting for them. "Hooray for {name}!" they shouted.

- {name} did not win the race, but {he} was happy. {He} learned that a friend is more important than a race.
- "You are the real winner," said {his} {parent}. {name} smiled and gave {friend} a hug.
- {friend} gave {name} {a_color} flower. "This is your prize," {fhe} said, "for the best friend in the world."
"""),
)

PLOTS["a messy room"] = Plot(
    [TOYS, rows("lure", "the zoo; the park; the beach; the farm; a party")],
    beats("""
- {name} had a lot of toys. But {he} never put them away. {Day}, {his} room was a big mess.
- {Day}, {name} played with all {his} toys. There were blocks and books and cars all over the floor. What a mess!

- "Please clean your room," said {his} {parent}. "Then we can go to {lure}." "[I do not want to|Not now|Later]," said
  {name}.
- {His} {parent} looked in. "Oh, what a mess!" said {Parent}. "Clean it up, please, and then we will go to {lure}."

- {name} sat on the bed. "It is too much work," {he} said. Then {he} got up, and crash! {He} fell over a box.
- {name} wanted to play with {his} {color} {toy} first. But {he} could not find it. There were too many things on the
  floor.

- "I have to clean up," {he} said. First {he} put the books on the shelf. Then {he} put the blocks in a box.
- So {name} began to clean. {He} made it a game and sang a song. One for the box, two for the shelf!
- Then {friend} came. "I will help you," said {friend}. They picked up the blocks and the cars and the books.

- Under the bed, {name} found {his} {color} {toy}. "There you are!" {he} said, and [hugged it|laughed].
- And what was that behind the chair? It was {his} {color} {toy}! {name} was so happy.

- Soon the room was clean. {Parent} came to see it. "Wow! Good job!" {phe} said. "Now we can go to {lure}."
- At last, everything was in its place. "I am proud of you," said {his} {parent}. "Let's go!"

- They went to {lure} and had a great time. {name} learned to put {his} toys away.
- {name} took {his} {toy} along to {lure}. After that day, {he} always cleaned {his} room.
- It was a fun day. And when {name} came home, {he} liked {his} clean room very much.
"""),
)

PLOTS["a new pet"] = Plot(
    [
        rows("pet sound", "puppy / Woof, woof; kitten / Meow, meow"),
        rows("pet_name", "Spot; Fluffy; Sunny; Lucky; Star; Button"),
        rows(
            "bad",
            "ate {his} shoe; jumped on the table; ran into the mud; got flour all over the kitchen; ate the dinner",
        )
        + rows("bad", "hid under the bed; broke a cup; made the bed all wet; pulled all the socks out of the box"),
    ],
    beats("""
- {name} wanted a pet more than anything. {Day}, {his} {parent} came home with a box. There was a sound in the box.
- {Day}, {his} {parent} said, "I have a surprise for you." {name} opened a box and looked inside.

- "{sound}!" It was a little {pet}! "Oh, thank you!" said {name}. "I will call it {pet_name}."
- A small, soft {pet} looked up at {him}. "{sound}!" it said. {name} laughed. "Your name is {pet_name}," {he} said.

- {name} and {pet_name} played all day. But {pet_name} was very [wild|silly]. It {bad}!
- At first, it was fun. But then {pet_name} {bad}. "No, {pet_name}!" [said|cried] {name}.

- "What can I do?" {name} asked. "{pet_name} is still a baby," said {Parent}. "You have to teach it. And you have to
  be kind."
- {name} was mad. But {his} {parent} said, "It does not know what is right. You can show it."

- So {name} took care of {pet_name} every day. {He} gave it food and water. {He} told it, "Good {pet}!" when it was
  good.
- Every day, {name} talked to {pet_name} in a soft voice. When the {pet} did something right, {he} gave it a little
  food.

- Soon {pet_name} was a very good {pet}. It came when {name} called, and it slept next to {his} bed.
- After some time, {pet_name} learned. Everyone was surprised. "What a good {pet}!" said {his} friend {friend}.

- "You are my best friend," said {name}. "{sound}!" said {pet_name}.
- {name} learned that a pet needs time and love. And {pet_name} loved {name} very much.
- {name} and {pet_name} were happy together. They played in the garden every day.
"""),
    animals=False,
)

PLOTS["a picnic"] = Plot(
    [
        rows("where", "by the lake; in the park; under a big tree; on the hill; in the field; by the river"),
        rows("bread", "bread and jam; bread and cheese; bread and eggs; bread and honey"),
        rows(
            "guests arrive snack",
            """
            ants / a long line of ants came / a little piece of bread
            ducks / three hungry ducks came / some bread
            birds / some little birds came down / some bread
                        geese / two big geese came / some bread
            """,
        ),
    ],
    beats("""
- {Day}, {name} and {his} {parent} went on a picnic. They took a basket with {bread}. They took some {treats} too.
- {Day}, {name} asked, "Can we eat outside today?" "Yes," said {his} {parent}. They put {bread} in a basket, and some
  {treats} too.

- They sat down {where}. The sun was warm, and the sky was blue. {His} friend {friend} came too.
- They found a nice place {where} and put {a_color} blanket on the grass. {His} friend {friend} came to eat with them.

- But then {arrive}! They wanted to eat the food. "Go away!" shouted {name}.
- Just when {name} wanted to eat, {arrive}. "Oh no!" said {name}. "They want our food!"

- {name} ran at the {guests}, but they came back. {He} ran at them again, and they came back again.
- {name} took the food away, but the {guests} did not stop. {He} did not know what to do.

- "Maybe they are just hungry," said {friend}. "We have [a lot|so much]. We can give them some."
- {His} {parent} laughed. "This is their home," said {Parent}. "We are the guests here. Let's share."

- So {name} put {snack} on a rock for the {guests}. They went to the rock and ate. Now everyone had food.
- {name} gave them {snack}. The {guests} were happy and went away to eat it.

- "Look, they have a picnic too!" said {name}, and everyone laughed.
- They ate and played until the sun went down. {name} learned that there is enough for everyone when we share.
- It was the best picnic ever. "Goodbye, little {guests}!" said {name} when they went home.
"""),
)

PLOTS["a day by the sea"] = Plot(
    [rows("sea_thing", "shell; rock; star; bottle"), rows("sea_pal", "crab; fish; turtle; seal; whale")],
    beats("""
- {Day}, {name} and {his} {parent} went to the sea. The water was blue, and the sand was warm.
- {Day}, {name} went to the beach with {his} {parent}. {He} ran to the water and got {his} feet wet.

- {name} looked for shells in the sand. Then {he} heard a small voice. "Help me, please!" It was a little {sea_pal}.
- {He} wanted to make a sand castle. But then a little {sea_pal} looked out of the water. "Can you help me?" it asked.

- "What is wrong?" asked {name}. "I lost my {color} {sea_thing}," said the {sea_pal}. "I can't find it in the water."
- {name} was surprised. "You can talk!" {he} said. "Yes," said the {sea_pal}. "And I lost my {color} {sea_thing}. I am
  so sad."

- "I will help you look," said {name}. {He} looked in the sand and in the water. {He} looked under every rock.
- {name} looked up and down the beach. There were many things in the sand, but the {sea_thing} was not there.

- Then something shone in the sun. {name} dug in the sand with {his} hands. It was the {color} {sea_thing}!
- {name} did not give up. {He} dug a hole in the sand, and there was the {color} {sea_thing}!

- "Thank you!" said the {sea_pal}. It was so happy that it [danced in the water|jumped up high|turned around and
  around].
- The {sea_pal} took the {sea_thing} and smiled. "You are very kind," it said. "I will never forget you."

- When the sun went down, {name} went home. {He} waved to the sea, and the {sea_pal} waved back.
- {name} told {his} {parent} about the {sea_pal}. {Parent} smiled. "The sea is full of friends," {phe} said.
- After that, {name} went to the beach every week to see {his} new friend.
"""),
    animals=False,
)


def story(rng: random.Random) -> str:
    """One story, drawn from `rng`."""
    plot = pick(rng, list(PLOTS.values()))
    cast = Cast(pick(rng, PEOPLE))
    while (friend := pick(rng, FRIENDS))["friend"] == cast["name"]:
        pass
    cast |= friend
    for table in (*COMMON, *plot.props):
        cast |= pick(rng, table)
    if plot.animals and rng.random() < ANIMAL_SHARE:
        cast |= pick(rng, ANIMALS)
    opening = ONCE if rng.random() < ONCE_SHARE else NOT_ONCE

    def say(beat: Beat) -> str:
        return pick(rng, pick(rng, beat)).format_map(cast).format_map(cast)  # twice: what fills a slot may hold slots

    first, *rest = plot.beats
    return "\n\n".join([" ".join(say(beat) for beat in (*opening, first)), *(say(beat) for beat in rest)])


def stories(seed: int) -> Iterator[str]:
    """An endless stream of stories of 60 to 200 words, the same for the same seed on every Python version."""
    rng = random.Random(seed)
    while True:
        yield story(rng)
