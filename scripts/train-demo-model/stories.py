"""Writes the training text: short stories for small children, from a seeded grammar.

Every story keeps a small state (who, where, what, with whom), so that names, pronouns, places and things agree from
the first sentence to the last. The vocabulary is deliberately small: a model of a few million parameters can learn it
in half an hour on two cores. Nothing here is taken from any other text.
"""

import random

GIRLS = "Mia Lily Anna Ella Rosa Nora Ruby Zoe Lucy Emma Clara Maya Ida Sara Tess Hanna Molly Greta Ivy Luna".split()
BOYS = "Tom Ben Max Sam Leo Jack Finn Noah Oscar Theo Milo Peter Hugo Adam Felix Otto Jonas Paul Ravi Omar".split()
ANIMAL_NAMES = "Pip Momo Bramble Hazel Pepper Biscuit Clover Juno Nibbles Poppy Rusty Willow Dot Fern Maple Mocha".split()

SMALL_ANIMALS = "mouse rabbit hedgehog squirrel frog duck sparrow kitten puppy mole turtle snail hamster lamb".split()
BIG_ANIMALS = "bear horse cow lion elephant deer goat donkey wolf ox".split()
SLY_ANIMALS = "fox crow raven cat weasel magpie".split()
NICE = "little kind small happy brave curious clever gentle cheerful quiet young merry".split()
BAD = "greedy proud lazy rude selfish grumpy".split()
COLOURS = "red blue green yellow white brown purple orange golden silver".split()

TOYS = "ball kite doll boat drum scarf hat bell button whistle book lantern basket ring key cup blanket train".split()
FOODS = [("apple", "apples"), ("pear", "pears"), ("cookie", "cookies"), ("berry", "berries"), ("nut", "nuts"),
         ("carrot", "carrots"), ("plum", "plums"), ("cake", "cakes"), ("bun", "buns"), ("cherry", "cherries")]
PLACES = [("the forest", "in"), ("the park", "in"), ("the garden", "in"), ("the meadow", "in"), ("the village", "in"),
          ("the river", "by"), ("the lake", "by"), ("the sea", "by"), ("the old mill", "near"), ("the farm", "on"),
          ("the hill", "on"), ("the beach", "on"), ("the barn", "in"), ("the market", "at"), ("the bridge", "near"),
          ("the orchard", "in"), ("the valley", "in"), ("the pond", "by")]
HOMES = ["in a small house by the river", "in a village near the hills", "on a farm with many animals",
         "in a little house at the edge of the forest", "in a warm house with a red door", "near a quiet lake",
         "in a town by the sea", "in a small house on the hill"]
DENS = ["under an old oak tree", "in a warm hole near the river", "in a nest of leaves and grass", "behind a big stone",
        "in a little den in the forest", "by a pond full of lilies", "in a hollow tree", "at the edge of the meadow"]
HIDING = ["under a bush", "behind a tree", "under a stone", "in the tall grass", "behind the barn", "under the bridge",
          "in a hole in the ground", "between two rocks", "under a pile of leaves", "next to an old boat", "behind a fence"]
WEATHER = ["The sun was warm and the sky was blue.", "It was a cold and windy day.", "The birds were singing in the trees.",
           "Soft rain was falling on the leaves.", "The grass was wet and the air was fresh.", "White clouds moved slowly over the hills.",
           "Snow covered the ground and everything was quiet.", "The wind smelled of flowers."]
TIMES = ["One day", "One morning", "One sunny morning", "One evening", "One cold day", "One summer day", "One afternoon",
         "One rainy day", "Early one morning", "One day in spring", "One day in autumn"]
GROWN_UPS = ["mother", "father", "grandmother", "grandfather", "aunt", "uncle", "teacher"]
SHE = {"mother", "grandmother", "aunt", "teacher"}


class Who:
    """Somebody in a story: a name, a kind, and the pronouns that go with them."""

    def __init__(self, name, kind, pronoun, home):
        self.name, self.kind, self.home = name, kind, home
        self.he = pronoun
        self.him = {"he": "him", "she": "her"}[pronoun]
        self.his = {"he": "his", "she": "her"}[pronoun]
        self.He, self.His = self.he.capitalize(), self.his.capitalize()


def an(words):
    """The words with the article that fits them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


class Teller:
    """Tells one story after the other, all from one seeded source of chance."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.plots = [self.lost, self.sharing, self.afraid, self.building, self.hurt_bird, self.truth, self.storm,
                      self.race, self.seed, self.trick, self.gift, self.sound, self.small_and_big, self.river,
                      self.lost_child, self.new_friend, self.wish]

    def one(self, *options):
        """One of the options, given one by one or as a list."""
        if len(options) == 1 and not isinstance(options[0], str):
            options = options[0]
        return self.random.choice(options)

    def maybe(self, chance, *options):
        return [self.one(*options)] if self.random.random() < chance else []

    def child(self, other=None):
        while True:
            girl = self.random.random() < 0.5
            name = self.one(GIRLS if girl else BOYS)
            if other is None or other.name != name:
                return Who(name, "girl" if girl else "boy", "she" if girl else "he", self.one(HOMES))

    def animal(self, kinds, other=None):
        while True:
            name, kind = self.one(ANIMAL_NAMES), self.one(kinds)
            if other is None or (other.name != name and other.kind != kind):
                return Who(name, kind, self.one("he", "she"), self.one(DENS))

    def hero(self):
        return self.child() if self.random.random() < 0.55 else self.animal(SMALL_ANIMALS)

    def friend(self, hero):
        if hero.kind in ("girl", "boy"):
            return self.child(hero) if self.random.random() < 0.5 else self.animal(SMALL_ANIMALS, hero)
        return self.animal(SMALL_ANIMALS, hero)

    def place(self):
        where, how = self.one(PLACES)
        return where, f"{how} {where}"

    def opening(self, w, with_home=True):
        nice, name, kind = self.one(NICE), w.name, w.kind
        line = self.one(
            f"Once upon a time, there was {an(nice)} {kind} named {name}.",
            f"Once upon a time, there was {an(nice)} {kind} named {name}.",
            f"Once upon a time, {an(nice)} {kind} named {name} lived {w.home}.",
            f"Once upon a time, there lived {an(nice)} {kind}. {w.His} name was {name}.",
            f"Once there was {an(nice)} {kind} called {name}.",
            f"Long ago, {an(nice)} {kind} named {name} lived {w.home}.",
            f"{name} was {an(nice)} {kind} who lived {w.home}.",
            f"There was once {an(nice)} {kind} whose name was {name}.")
        lines = [line]
        if with_home and w.home not in line:
            lines += self.maybe(0.7, f"{w.He} lived {w.home}.", f"{name} lived {w.home}.")
        return lines

    def says(self, who, words):
        """A line of speech; the words end in . ! or ?"""
        name = who if isinstance(who, str) else who.name
        verb = "asked" if words.endswith("?") else self.one("said", "said", "said", "called", "answered")
        if words.endswith("."):
            return self.one(f'"{words[:-1]}," {verb} {name}.', f'{name} {verb}, "{words}"')
        return self.one(f'"{words}" {verb} {name}.', f'{name} {verb}, "{words}"')

    def moral(self, w, *lessons):
        lesson = self.one(lessons)
        return self.one(
            [f"From that day on, {w.name} knew that {lesson}."],
            [f"{w.name} learned that {lesson}."],
            [f"And so {w.name} learned that {lesson}."],
            [f"That night, {w.name} thought about the day. Now {w.he} knew that {lesson}."],
            [f"{w.name} never forgot that {lesson}."])

    def ending(self, *options):
        return self.maybe(0.45, *(list(options) + [
            "And they all lived happily ever after.", "It was a very good day.", "Everyone was happy.",
            "Then they all went home and slept well.", "The end."]))

    # -- the plots ---------------------------------------------------------------------------------------------------

    def lost(self):
        w = self.hero()
        f = self.friend(w)
        where, at = self.place()
        colour, toy = self.one(COLOURS), self.one(TOYS)
        spot, wrong = self.random.sample(HIDING, 2)
        s = self.opening(w)
        s += [self.one(f"{w.He} had {an(colour)} {toy} and loved it very much.",
                       f"{w.name} had {an(colour)} {toy}. It was {w.his} favorite thing in the world.",
                       f"{w.His} favorite thing was {an(colour)} {toy}.")]
        s += [self.one(f"{self.one(TIMES)}, {w.name} went to play {at}.", f"{self.one(TIMES)}, {w.he} took the {toy} to {where}.")]
        s += self.maybe(0.4, WEATHER)
        s += [self.one(f"When {w.he} wanted to go home, the {toy} was gone.", f"But after a while, {w.he} could not find the {toy}.",
                       f"Then {w.he} saw that the {toy} was not there any more.")]
        s += [self.one(f"{w.name} was very sad and began to cry.", f"{w.name} looked everywhere, but {w.he} could not see it.",
                       f"{w.name} felt sad. {w.He} sat down and cried.")]
        s += [self.one(f"{f.name} the {f.kind} came by." if f.kind not in ("girl", "boy") else f"{w.His} friend {f.name} came by.",
                       f"Just then, {an(f.kind)} named {f.name} came along.")]
        s += [self.says(f, self.one("Why are you sad?", "What is wrong?", "Why are you crying?"))]
        s += [self.says(w, self.one(f"I lost my {colour} {toy}.", f"My {toy} is gone.", f"I can not find my {toy}."))]
        s += [self.says(f, self.one("Do not worry, I will help you.", "Let us look for it together.", "Do not cry. We will find it!"))]
        s += self.maybe(0.6, f"First they looked {wrong}, but it was not there.", f"They looked {wrong}. There was nothing but an old shoe.",
                        f"They searched {wrong}, but found only leaves.")
        s += [self.one(f"Then they looked {spot}, and there it was!", f"At last {f.name} looked {spot}. There was the {colour} {toy}!",
                       f"Then {f.name} saw something {colour} {spot}. It was the {toy}!")]
        s += [self.one(f"{w.name} jumped with joy and hugged {f.name}.", f"{w.name} was so happy that {w.he} danced.", f"{w.name} smiled a big smile.")]
        s += [self.says(w, self.one(f"Thank you, {f.name}!", f"Thank you for your help, {f.name}.", "You are a good friend!"))]
        s += self.moral(w, "a good friend helps you when you are sad", "two can find what one can not", "friends are worth more than any toy",
                        "it is good to ask for help")
        return s + self.ending()

    def sharing(self):
        w = self.hero()
        f = self.friend(w)
        food, foods = self.one(FOODS)
        where, at = self.place()
        count = self.one("two", "three", "four", "five", "six")
        s = self.opening(w)
        s += [self.one(f"{self.one(TIMES)}, {w.he} found {count} {foods} {at}.", f"{self.one(TIMES)}, {w.his} {self.one(GROWN_UPS)} gave {w.him} {count} {foods}.")]
        s += [self.one(f"{w.name} wanted to eat them all.", f"They looked very sweet, and {w.name} was hungry.", f"{w.He} put them in a basket and went to {where}.")]
        s += [self.one(f"On the way, {w.he} met {f.name} the {f.kind}.", f"Then {w.he} saw {an(f.kind)} named {f.name}.")]
        s += [self.one(f"{f.name} looked tired and hungry.", f"{f.name} was thin and had nothing to eat.", f"{f.name} was sitting on the ground and did not smile.")]
        s += [self.says(f, self.one(f"I have not eaten all day.", f"May I have one {food}?", f"Those {foods} smell so good."))]
        s += [self.one(f"{w.name} thought for a moment.", f"{w.name} looked at the {foods} and then at {f.name}.")]
        s += [self.says(w, self.one("You can have half of them.", f"Here, take these {foods}. We can share!", "Let us eat together."))]
        s += [self.one(f"They sat down and ate the {foods} together.", f"So they shared the {foods} and talked until the sun went down.")]
        s += [self.one(f"The {foods} tasted even better than before.", f"{f.name} felt strong again.", f"Soon both of them were full and happy.")]
        if self.random.random() < 0.6:
            s += [self.one(f"The next day, {w.name} fell into a hole and could not get out.", f"A week later, {w.name} got lost {at}.",
                           f"The next winter, {w.name} had no food left.")]
            s += [self.one(f"{f.name} heard {w.him} call and came at once.", f"But {f.name} remembered {w.him} and came to help.")]
            s += [self.says(f, self.one("You were kind to me, so I will help you.", f"You shared your {foods} with me. Now it is my turn!"))]
        s += self.moral(w, "sharing makes everything taste better", "kindness always comes back", "it feels good to give",
                        "a shared meal makes a friend")
        return s + self.ending()

    def afraid(self):
        w = self.hero()
        g = self.one(GROWN_UPS)
        he = "she" if g in SHE else "he"
        fear, place, brave = self.one([
            ("the dark", "in bed at night", "turned off the lamp"), ("the deep water", "by the lake", "stepped into the water"),
            ("thunder", "at the window", "listened to the storm"), ("high places", "on the hill", "climbed to the top"),
            ("the big dog next door", "at the gate", "held out a hand to the dog"), ("new people", "at school", "said hello")])
        s = self.opening(w)
        s += [self.one(f"{w.name} was afraid of {fear}.", f"There was only one thing that {w.name} did not like: {fear}.", f"{w.He} was not afraid of much, but {w.he} was afraid of {fear}.")]
        s += [f"{self.one(TIMES)}, {w.name} stood {place} and could not move." if place != "in bed at night" else f"One night, {w.name} lay {place} and could not sleep."]
        s += self.maybe(0.5, f"{w.His} heart beat very fast.", f"{w.His} legs were shaking.", f"{w.He} closed {w.his} eyes.")
        s += [self.one(f"{w.His} {g} came and sat next to {w.him}.", f"{w.His} {g} saw this and took {w.his} hand.")]
        s += [self.says(f"{w.his} {g}", self.one("Everybody is afraid of something.", "I was afraid too when I was small.", "You do not have to be brave alone."))]
        s += [self.says(w, self.one("What can I do?", "But what did you do?", "Will it always be like this?"))]
        s += [self.says(f"{w.his} {g}", self.one("Take one small step, and then another.", "Count to three and try again.", "Take a deep breath and look again."))]
        s += [self.one(f"{w.name} took a deep breath.", f"{w.name} counted: one, two, three.", f"{w.name} thought about these words.")]
        s += [self.one(f"Then {w.he} {brave}.", f"Slowly, {w.he} {brave}.")]
        s += [self.one(f"Nothing bad happened.", f"It was not so bad at all.", f"It was even a little bit fun!")]
        s += [self.says(w, self.one("I did it!", "Look at me!", "I am not afraid any more!"))]
        s += [self.one(f"{w.His} {g} smiled and was very proud.", f"{w.His} {g} laughed, and {he} hugged {w.him}.")]
        s += self.moral(w, "being brave means to try, even when you are afraid", "small steps can take you far", "fear gets smaller when you look at it")
        return s + self.ending()

    def building(self):
        w = self.hero()
        f = self.friend(w)
        thing, use = self.one([("boat", "sail across the pond"), ("tree house", "see the whole forest"), ("kite", "touch the clouds"),
                               ("bridge", "cross the river"), ("tower", "look over the hills"), ("cart", "carry apples to the market"),
                               ("snow house", "stay warm in the winter")])
        where, at = self.place()
        s = self.opening(w)
        s += [self.one(f"{w.name} wanted to build {an(thing)}, so that {w.he} could {use}.", f"{w.His} dream was to {use}. So {w.he} wanted to build {an(thing)}.")]
        s += [f"{self.one(TIMES)}, {w.he} took {self.one('some wood and a rope', 'paper and string', 'sticks and stones', 'a hammer and some nails')} and began to work {at}."]
        s += [self.one(f"But the {thing} broke.", f"It was hard work, and soon the {thing} fell apart.", f"A strong wind came, and the {thing} fell down.")]
        s += [self.says(w, self.one("I will never do it.", "This is too hard!", f"My {thing} is broken."))]
        s += [self.one(f"{f.name} the {f.kind} heard this.", f"{w.His} friend {f.name} was watching.")]
        s += [self.says(f, self.one("May I help you?", "You hold it, and I will tie the rope.", "Let us try again together!"))]
        s += [self.one(f"They worked all day.", f"They worked until the stars came out.", f"{w.name} held the long pieces, and {f.name} tied them together.")]
        s += self.maybe(0.5, f"When one of them was tired, the other one sang a song.", f"They made many mistakes, but they did not stop.", WEATHER[0])
        s += [self.one(f"At last the {thing} was ready.", f"In the end, they had a fine {thing}.", f"And this time, the {thing} did not break.")]
        s += [self.one(f"Now they could {use}!", f"They could {use}, and everybody came to look.")]
        s += [self.says(w, self.one("We did it!", f"This is our {thing} now.", f"I could not do this without you, {f.name}."))]
        s += self.moral(w, "hard work is easier with a friend", "you must not give up when something breaks", "many hands make light work",
                        "every mistake teaches you something")
        return s + self.ending()

    def hurt_bird(self):
        w = self.child()
        g = self.one("mother", "father", "grandmother", "grandfather")
        bird = self.one("bird", "sparrow", "owl", "duck", "swallow")
        where, at = self.place()
        s = self.opening(w)
        s += [f"{self.one(TIMES)}, {w.he} was walking {at} when {w.he} heard a soft cry."]
        s += [self.one(f"On the ground was a small {bird} with a hurt wing.", f"{self.one(HIDING).capitalize()} sat a little {bird}. It could not fly.")]
        s += [self.says(w, self.one("Do not be afraid, little one.", f"Poor little {bird}!", "I will take care of you."))]
        s += [self.one(f"{w.He} carried the {bird} home in {w.his} {self.one('hat', 'scarf', 'hands', 'basket')}.", f"{w.He} picked it up very gently and took it home.")]
        s += [self.one(f"{w.His} {g} made a soft bed for it in a box.", f"{w.name} and {w.his} {g} put the {bird} in a warm box.")]
        s += [self.one(f"Every day, {w.name} gave it water and seeds.", f"{w.name} fed it every morning and every evening.")]
        s += self.maybe(0.6, f"At night, {w.he} sat by the box and told it stories.", f"The {bird} began to sing a little song.")
        s += [self.one("After two weeks, the wing was strong again.", "Day by day, the wing got better.", "Soon the wing was well.")]
        s += [self.says(f"{w.his} {g}", self.one("Now you must let it go.", f"The {bird} wants to fly, {w.name}."))]
        s += [self.one(f"{w.name} was sad, but {w.he} opened the window.", f"{w.name} carried the box outside and opened it.")]
        s += [self.one(f"The {bird} flew up into the blue sky.", f"The {bird} flew once around the house and then away.")]
        s += [self.one(f"But the next spring, the {bird} came back and sang at {w.his} window.", f"From then on, the {bird} came to visit every morning.",
                       f"Sometimes, when {w.name} was outside, the {bird} came and sat on {w.his} arm.")]
        s += self.moral(w, "to love somebody also means to let them go", "even a small kindness is not forgotten", "it is good to take care of others")
        return s + self.ending()

    def truth(self):
        w = self.child()
        g = self.one("mother", "father", "grandmother", "grandfather")
        he = "she" if g in SHE else "he"
        thing = self.one("vase", "window", "cup", "lamp", "plate", "mirror", "jar of honey")
        toy = self.one("ball", "kite", "drum", "stick")
        s = self.opening(w)
        s += [self.one(f"{self.one(TIMES)}, {w.he} played with {w.his} {toy} in the house.", f"{w.His} {g} always told {w.him} not to play with the {toy} in the house.")]
        s += [self.one(f"Crash! The {thing} fell down and broke.", f"Suddenly the {toy} hit the {thing}, and it broke.")]
        s += [self.one(f"{w.name} was scared. {w.He} hid the pieces under the bed.", f"{w.name} did not know what to do, so {w.he} ran away and hid.")]
        s += [f"Soon {w.his} {g} came home."]
        s += [self.says(f"{w.his} {g}", self.one(f"What happened to the {thing}?", f"Where is the {thing}?"))]
        s += [self.one(f'"{self.one("The cat did it", "I do not know", "It was the wind")}," said {w.name}, but {w.his} face was red.', f"{w.name} looked at the floor and said nothing.")]
        s += [self.one(f"All day, {w.name} felt bad.", f"{w.name} could not eat, and {w.he} could not play.", f"That night, {w.name} could not sleep.")]
        s += [f"At last {w.he} went to {w.his} {g}."]
        s += [self.says(w, self.one(f"I broke the {thing}. I am sorry.", f"It was me. I broke the {thing}, and I am very sorry."))]
        s += [self.one(f"{w.His} {g} was quiet for a moment. Then {he} smiled.", f"{w.His} {g} took {w.his} hand.")]
        s += [self.says(f"{w.his} {g}", self.one(f"Thank you for telling me the truth.", f"A {thing.split()[0]} can break. It is more important that you are honest."))]
        s += self.maybe(0.5, f"Together they {self.one('glued the pieces', 'cleaned the floor', 'went to buy a new one')}.")
        s += self.moral(w, "it is always better to tell the truth", "the truth is hard to say, but it makes the heart light", "a lie makes you feel small")
        return s + self.ending()

    def storm(self):
        w = self.hero()
        f = self.friend(w)
        b = self.animal(BIG_ANIMALS, w)
        where, at = self.place()
        s = self.opening(w)
        s += [self.one(f"{self.one(TIMES)}, {w.name} and {w.his} friend {f.name} went to {where}.", f"{self.one(TIMES)}, {w.he} went for a long walk with {f.name}.")]
        s += self.maybe(0.5, "They picked flowers and sang songs.", "They wanted to see what was behind the hills.", "They ran and laughed and did not look at the sky.")
        s += [self.one("Then the sky became dark, and it started to rain.", "Suddenly there was a loud crash of thunder.", "A strong wind came up, and big drops fell from the sky.")]
        s += [self.says(f, self.one("We must find a dry place!", "I am cold and wet.", "I want to go home!"))]
        s += [self.one("They ran until they saw a cave.", "They saw a small light between the trees and ran to it.", "There was an old barn, and they ran inside.")]
        s += [self.one(f"Inside sat a big {b.kind}. It was {b.name}.", f"But somebody was already there: a very big {b.kind}!")]
        s += [self.one(f"{w.name} was scared and wanted to run away.", f"{f.name} hid behind {w.name}.")]
        s += [self.says(f"the {b.kind}", self.one("Do not be afraid. Come in and get dry.", "There is room for all of us.", "I am alone and I do not like thunder. Please stay!"))]
        s += [self.one(f"So they sat close together, and the big {b.kind} kept them warm.", f"They sat down next to the {b.kind} and listened to the rain.", f"The {b.kind} told them old stories until the storm was over.")]
        s += [self.one("After the storm, there was a rainbow over the hills.", "When the sun came out again, they were friends.", "In the morning, the sky was blue again.")]
        s += [self.says(w, self.one("Thank you for letting us in!", "May we come again?", "You are not scary at all."))]
        s += self.moral(w, "somebody who looks scary can have a kind heart", "a storm is not so bad when you are not alone", "you should not judge others by how they look")
        return s + self.ending()

    def race(self):
        w = self.animal(SMALL_ANIMALS)
        p = self.animal(["fox", "horse", "deer", "hare", "goat", "wolf"], w)
        where, at = self.place()
        s = self.opening(w, False)
        s += [f"{w.name} was not very fast, but {w.he} never gave up."]
        s += [self.one(f"In the same place lived {p.name} the {p.kind}, who was very proud.", f"{w.name} knew {an(self.one(BAD))} {p.kind} named {p.name}.")]
        s += [self.says(p, self.one("I am the fastest of all!", f"You are so slow, {w.name}!", "Nobody can win against me."))]
        s += [self.says(w, self.one("Let us have a race.", "Then let us run to the big tree and see.", "We will see about that."))]
        s += [self.one(f"{self.one(TIMES)}, all the animals came to {where} to watch.", f"The race began {at}, and everybody came to see it.")]
        s += [self.one(f"{p.name} ran so fast that soon nobody could see {p.him}.", f"{p.name} was far ahead after a short time.")]
        s += [self.one(f"But then {p.he} lay down under a tree and fell asleep.", f"Then {p.he} stopped to eat some berries and forgot the race.",
                       f"But {p.he} did not look where {p.he} was going, and {p.he} fell into the mud.")]
        s += [self.one(f"{w.name} went on, step by step.", f"{w.name} did not stop and did not rest.")]
        if self.random.random() < 0.4:
            s += [f"When {w.name} saw {p.him}, {w.he} stopped.", self.says(w, self.one("Come, we will go together.", "Are you hurt? Take my hand.")),
                  f"So they came to the end together, and {p.name} was not proud any more."]
        else:
            s += [self.one(f"At the end, {w.name} was the first one at the big tree.", f"When {p.name} came running at last, {w.name} was already there."),
                  self.one("Everybody cheered.", "All the animals clapped and laughed."), self.says(p, self.one("I was too proud. You have won.", f"You are better than me today, {w.name}."))]
        s += self.moral(w, "slow and steady wins the race", "it is better to be kind than to be first", "you can do a lot if you do not stop")
        return s + self.ending()

    def seed(self):
        w = self.hero()
        plant = self.one("sunflower", "apple tree", "pumpkin", "rose", "bean plant", "cherry tree")
        colour = self.one(COLOURS)
        g = self.one("an old man", "an old woman", f"{w.his} grandmother", f"{w.his} grandfather", "a wise owl")
        s = self.opening(w)
        s += [f"{self.one(TIMES)}, {g} gave {w.him} a small seed."]
        g = g.replace("an old", "the old").replace("a wise", "the wise")
        s += [self.says(g, self.one("Put it in the ground and wait.", "This seed is small, but it can become something big.", "Take good care of it."))]
        s += [f"{w.name} planted the seed {self.one('in the garden', 'behind the house', 'near the fence', 'by the river')}."]
        s += [self.one(f"Every day, {w.he} gave it water.", f"{w.He} watered it each morning before breakfast.")]
        s += [self.one("But nothing happened.", "The first week, there was only brown earth.", "Day after day, nothing came out of the ground.")]
        s += [self.says(w, self.one("When will it grow?", "Maybe my seed is asleep.", "I do not want to wait any more!"))]
        s += [self.says(g, self.one("Good things need time.", "Be patient. It is growing where you can not see it."))]
        s += [self.one(f"So {w.name} waited and did not give up.", f"{w.name} pulled out the weeds and waited.")]
        s += [self.one(f"Then, {self.one('one morning', 'after the rain', 'in the spring')}, there was a tiny green leaf!", "At last a little green leaf looked out of the earth.")]
        s += [self.one(f"It grew and grew until it was a big {plant}.", f"The leaf became {an(plant)}, as tall as the house.")]
        s += self.maybe(0.6, f"It had {colour} flowers, and the bees came to visit.", f"{w.name} sat in its shade and read {w.his} book.", f"{w.name} gave a part of it to all the neighbors.")
        s += self.moral(w, "good things need time", "if you are patient, small things grow big", "care and patience make things grow")
        return s + self.ending()

    def trick(self):
        sly = self.animal(SLY_ANIMALS)
        w = self.animal(SMALL_ANIMALS, sly)
        food, foods = self.one(FOODS)
        where, at = self.place()
        bad = self.one(BAD)
        s = self.opening(w, False)
        s += [self.one(f"{w.He} had a basket full of {foods}.", f"All summer, {w.he} had worked hard and collected many {foods}.")]
        s += [f"{self.one(TIMES)}, {an(bad)} {sly.kind} named {sly.name} saw this."]
        s += [self.one(f"{sly.name} wanted to have all the {foods}.", f"The {sly.kind} was too lazy to look for {sly.his} own food.")]
        s += [self.says(sly, self.one(f"Your house is on fire, {w.name}! Run!", f"There are much better {foods} {at}.", "Close your eyes, and I will show you a trick."))]
        s += [self.one(f"But {w.name} was clever.", f"{w.name} looked into the eyes of the {sly.kind} and knew that it was a lie.")]
        s += [self.says(w, self.one(f"Very good! But first, look into this hole. The best {foods} are in there.", "Thank you! Please hold this rope for me while I look.", f"You go first, and I will follow you."))]
        s += [self.one(f"The {sly.kind} jumped in and could not get out.", f"The {sly.kind} did so and fell into the cold water.", f"The {sly.kind} did so, and a big stone fell on {sly.his} tail.")]
        s += [self.says(sly, self.one("Help me, please!", "Let me out! I will never lie again."))]
        s += [self.one(f"{w.name} waited a little while, and then {w.he} helped {sly.him}.", f"{w.name} was not only clever, but also kind. {w.He} helped {sly.him} out.")]
        s += [self.says(w, self.one(f"If you are hungry, you only have to ask.", f"You could have asked me for {an(food)}."))]
        s += [self.one(f"The {sly.kind} was ashamed and said sorry.", f"{sly.name} hung {sly.his} head.", f"After that, {sly.name} worked for {sly.his} own {foods}.")]
        s += self.moral(sly, "it is better to ask than to steal", "a lie can catch the one who tells it", "being clever is good, but being kind is better")
        return s + self.ending()

    def gift(self):
        w = self.child()
        g = self.one("mother", "father", "grandmother", "grandfather")
        he, him = ("she", "her") if g in SHE else ("he", "him")
        gift = self.one("a picture of the sea", "a warm scarf", "a song", "a small wooden bird", "a cake", "a letter", "a paper flower", "a box of shells")
        s = self.opening(w)
        s += [self.one(f"It was the birthday of {w.his} {g}, and {w.name} had no money for a gift.", f"Tomorrow was the birthday of {w.his} {g}. {w.name} did not know what to give {him}.")]
        s += [self.says(w, self.one("What can I give?", "I wish I had some money.", "A gift must come from the shop."))]
        s += [self.one(f"{w.He} asked {w.his} friend {self.child(w).name}.", f"{w.He} went to {self.place()[0]} and thought for a long time.")]
        s += [self.one(f"Then {w.he} had an idea.", f"Suddenly {w.name} smiled. {w.He} had an idea.")]
        s += [f"{w.He} would make {gift}."]
        s += [self.one(f"{w.name} worked all night.", f"{w.name} worked very hard, and nobody was allowed to look.", f"It took {w.him} the whole day.")]
        s += self.maybe(0.5, f"It was not perfect, but it was made with love.", f"Two times it went wrong, and {w.he} began again.")
        s += [f"In the morning, {w.he} gave it to {w.his} {g}."]
        s += [self.says(f"{w.his} {g}", self.one("This is the best gift of all!", "Did you make this for me?", "It is so beautiful. Thank you!"))]
        s += [self.one(f"{w.His} {g} had tears in {('her' if he == 'she' else 'his')} eyes, because {he} was so happy.", f"Then {he} hugged {w.name} for a long time.")]
        s += self.moral(w, "the best gifts come from the heart", "love can not be bought in a shop", "a gift does not have to cost money")
        return s + self.ending()

    def sound(self):
        w = self.hero()
        f = self.friend(w)
        sound, thing = self.one([("a soft crying", "a lost kitten"), ("a strange knocking", "a branch in the wind"), ("a deep hooting", "an old owl"),
                                 ("a tiny song", "a cricket with a tiny violin"), ("a loud splash", "a happy frog"), ("a slow scratching", "a mole who had lost the way")])
        s = self.opening(w)
        s += [self.one(f"One night, {w.name} heard {sound} outside.", f"Every night, {w.he} heard {sound}, and {w.he} did not know what it was.")]
        s += [self.says(w, self.one("What is that?", "Who is there?", "Maybe it is a monster!"))]
        s += [self.one(f"{w.He} woke up {f.name}, and they took a lantern.", f"The next night, {w.name} and {f.name} went out with a lantern.")]
        s += [self.says(f, self.one("I am not afraid if you are with me.", "Stay close to me.", "Listen! It comes from over there."))]
        s += self.maybe(0.6, "The moon was big and round.", "The wind moved the trees, and shadows danced on the ground.", "It was very dark, and the stars were bright.")
        s += [self.one(f"They followed the sound to {self.place()[0]}.", f"Slowly they walked to {self.place()[0]}.")]
        s += [self.one(f"There, {self.one(HIDING)}, they found {thing}!", f"And what did they see? It was only {thing}!")]
        s += [self.one(f"{w.name} laughed, and {f.name} laughed too.", f"They looked at each other and began to laugh.")]
        s += [self.says(f, self.one("That is not a monster at all!", "And we were so scared!", "Now we know."))]
        s += [self.one(f"From then on, {w.name} liked the sound and fell asleep with it.", f"After that, {w.he} slept very well.")]
        s += self.moral(w, "many scary things are small when you look at them", "it is good to be curious", "a lantern and a friend are enough against the dark")
        return s + self.ending()

    def small_and_big(self):
        w = self.animal(SMALL_ANIMALS)
        b = self.animal(BIG_ANIMALS, w)
        s = self.opening(w, False)
        s += [f"Nearby lived a big {b.kind} named {b.name}."]
        s += [self.one(f"{self.one(TIMES)}, {w.name} ran over the foot of the {b.kind} by mistake.", f"{self.one(TIMES)}, {w.name} asked {b.name} to play.")]
        s += [self.says(b, self.one("You are too small! What can you do?", "Go away, little one!", "A small one like you can never help me."))]
        s += [self.says(w, self.one("I am small, but one day I may help you.", "Even small friends can be good friends.", "Please do not be angry."))]
        s += [self.one(f"The {b.kind} laughed and let {w.him} go.", f"{b.name} laughed so loud that the trees shook.")]
        s += [self.one(f"A few days later, {b.name} was caught in a net.", f"The next week, {b.name} had a thorn in {b.his} foot.", f"Then one night, {b.name} got stuck between two rocks.")]
        s += [self.one(f"{b.He} pulled and pulled, but it did not help.", f"{b.He} cried so loud that all the animals heard it.")]
        s += [self.one(f"{w.name} heard it and came running.", f"Only {w.name} came to help.")]
        s += [self.says(w, self.one("Hold still, I can help you.", "Do not move. I will get you out.", "My small teeth and hands are just right for this."))]
        s += [self.one(f"It took a long time, but at last {b.name} was free.", f"{w.name} worked all night, and in the morning the {b.kind} was free.")]
        s += [self.says(b, self.one("I was wrong. Thank you, my little friend!", "You are small, but your heart is big.", "I will never laugh at you again."))]
        s += self.moral(b, "no friend is too small", "even the strong need help sometimes", "small friends can do big things")
        return s + self.ending()

    def river(self):
        w = self.hero()
        f = self.friend(w)
        g = self.one("grandmother", "grandfather", "aunt", "uncle")
        s = self.opening(w)
        s += [self.one(f"{self.one(TIMES)}, {w.he} wanted to visit {w.his} {g} on the other side of the river.", f"{w.His} {g} lived on the other side of the river, and {w.name} wanted to go there.")]
        s += [self.one("But the water was high, and the bridge was gone.", "But the old bridge was broken.", "But the river was wide and fast.")]
        s += [self.one(f"There {w.he} met {f.name} the {f.kind}.", f"{f.name} the {f.kind} was sitting on a stone.")]
        s += [self.says(w, self.one("How can I get to the other side?", "Do you know the way?"))]
        s += [self.says(f, self.one("We could jump from stone to stone.", "There is a fallen tree near the mill.", "Let us make a boat from this old door.", "Follow me, I know a better way."))]
        s += [self.one(f"They held hands and went very slowly.", f"{f.name} went first, and {w.name} came after.", f"They were careful and did not hurry.")]
        s += self.maybe(0.6, f"Once {w.name} almost fell, but {f.name} held {w.him}.", "The water was cold, and it sang under their feet.", "A big fish looked at them and swam away.")
        s += [self.one("At last they were on the other side.", "In the end they made it, and their feet were not even wet.")]
        s += [f"{w.name}'s {g} was already waiting with {self.one('warm soup', 'hot tea', 'sweet bread', 'a big cake')}."]
        s += [self.says(f"the {g}", self.one("You are very brave!", "Come in, both of you.", "Who is your new friend?"))]
        s += [self.one("They ate and told the story again and again.", "They sat by the fire until it was late.")]
        s += self.moral(w, "there is always a way if you look for it", "it is safer to go together", "going slowly can be the fastest way")
        return s + self.ending()

    def lost_child(self):
        w = self.hero()
        h = self.animal(SLY_ANIMALS + BIG_ANIMALS, w)
        where, at = self.place()
        s = self.opening(w)
        s += [f"{self.one(TIMES)}, {w.name} followed {self.one('a butterfly', 'a white rabbit', 'a falling leaf', 'a strange light', 'a little stream')} and went too far."]
        s += [self.one(f"Soon {w.he} did not know where {w.he} was.", f"When {w.he} looked up, {w.he} could not see {w.his} home any more.")]
        s += self.maybe(0.5, WEATHER)
        s += [self.one(f"{w.name} called for help, but nobody came.", f"It was getting dark, and {w.name} was scared.")]
        s += [self.one(f"Then {an(h.kind)} came out of the trees.", f"Then {w.he} met {an(h.kind)} who was carrying a lantern.")]
        s += [self.says(f"the {h.kind}", self.one("Are you lost?", "What are you doing here so late?", "You are far away from home, little one."))]
        s += [self.says(w, self.one("Yes, and I want to go home.", "I do not know the way.", "Can you help me?"))]
        s += [self.says(f"the {h.kind}", self.one("My name is " + h.name + ". I will take you home.", "Look at that bright star and follow me.", "Follow the river. It always goes to your village."))]
        s += [self.one(f"They walked {self.one('over the hill', 'along the river', 'through the forest', 'past the old mill')} until they saw a light.", f"{h.name} knew every tree and every stone.")]
        s += [self.one(f"It was the window of {w.name}'s house!", f"There stood {w.name}'s mother and called {w.his} name.")]
        s += [self.one(f"{w.name} ran home and was very happy.", f"{w.His} mother hugged {w.him} and cried with joy.")]
        s += [f"When {w.he} turned around to say thank you, the {h.kind} was {self.one('gone', 'already far away', 'smiling at the edge of the trees')}."]
        s += self.moral(w, "you should not go too far alone", "help can come from a stranger with a kind heart", "home is the best place of all")
        return s + self.ending()

    def new_friend(self):
        w = self.child()
        f = self.child(w)
        toy, colour = self.one(TOYS), self.one(COLOURS)
        where, at = self.place()
        s = self.opening(w)
        s += [self.one(f"{w.name} was new in the village and had no friends yet.", f"{w.name} always played alone.")]
        s += [f"{self.one(TIMES)}, {w.he} saw {an(f.kind)} {at}. The {f.kind} had {an(colour)} {toy}."]
        s += [self.one(f"{w.name} wanted to say hello, but {w.he} was shy.", f"{w.name} stood behind a tree and watched.")]
        s += [self.one(f"Then the {toy} fell into the water.", f"Then the {toy} got stuck high up in a tree.", f"Then the wind took the {toy} away.")]
        s += [self.says(f"the {f.kind}", self.one(f"Oh no, my {toy}!", f"Who can help me?", f"That was a gift from my grandmother!"))]
        s += [self.one(f"{w.name} did not think. {w.He} ran and got the {toy} back.", f"{w.name} took a long stick and got the {toy} back.")]
        s += [self.says(w, self.one(f"Here is your {toy}.", "I hope it is not broken."))]
        s += [self.says(f"the {f.kind}", self.one(f"Thank you! I am {f.name}. What is your name?", f"You are so kind! My name is {f.name}."))]
        s += [self.says(w, f"I am {w.name}.")]
        s += [self.says(f, self.one("Do you want to play with me?", f"We can play with the {toy} together!", "Come, I will show you my secret place."))]
        s += [self.one("They played until it was dark.", f"All afternoon, {w.name} and {f.name} played and laughed.", "From that day on, they met every day.")]
        s += self.moral(w, "a small hello can be the start of a friendship", "helping is the best way to find a friend", "you only need a little courage to find a friend")
        return s + self.ending()

    def wish(self):
        w = self.hero()
        giver = self.one("fish", "star", "fairy", "old wizard", "golden bird", "tiny man with a green hat")
        first, result = self.one([("a mountain of cake", "soon the cake was everywhere, and nobody could open the door"),
                                  ("to be as tall as a tree", "then the house was too small, and all the friends ran away"),
                                  ("that it would always be summer", "but then there was no rain, and the flowers began to die"),
                                  ("to never sleep again", "but the nights were long, and everybody else was asleep"),
                                  ("that everything would turn to gold", "but gold is cold, and one can not eat it")])
        s = self.opening(w)
        s += [f"{self.one(TIMES)}, {w.he} helped {an(giver)} that was caught {self.one(HIDING)}."]
        s += [self.says(f"the {giver}", self.one("You saved me, so you have two wishes.", "Thank you! I will give you two wishes."))]
        s += [self.one(f"{w.name} did not think for long. {w.He} wished for " + first + "." if not first.startswith(("to", "that")) else f"{w.name} did not think for long. {w.He} wished " + first + ".")]
        s += [self.one("At first it was wonderful.", "For one day, it was very nice."), result[0].upper() + result[1:] + "."]
        s += [self.one(f"{w.name} was sad and did not know what to do.", f"{w.name} sat down and cried.")]
        s += [self.says(w, self.one("Please, let everything be as it was before.", "I wish that everything was like before!"))]
        s += [self.one(f"The {giver} laughed, and everything was good again.", "There was a flash of light, and everything was like before.")]
        s += [self.says(f"the {giver}", self.one("Now you know it too.", "That was a wise wish.", "Most people need more wishes to learn that."))]
        s += [self.one(f"{w.name} went home and ate {self.one('bread and butter', 'soup', 'an apple')}, and it tasted wonderful.", f"{w.name} ran home to {w.his} friends and laughed with them.")]
        s += self.moral(w, "it is good to be happy with what you have", "you should think before you wish", "the best things are the ones we already have")
        return s + self.ending()

    def story(self):
        """One story: a few short paragraphs of one to four sentences."""
        sentences = self.one(self.plots)()
        paragraphs, i = [], 0
        while i < len(sentences):
            n = self.random.randint(2, 5)
            paragraphs.append(" ".join(sentences[i:i + n]))
            i += n
        text = "\n\n".join(p[0].upper() + p[1:] for p in paragraphs)
        # Speech tags put a lower-case "his mother" or "the fox" at the start of a sentence: give it its capital.
        for end in (". ", "! ", "? ", '." ', '!" ', '?" '):
            text = end.join(part[:1].upper() + part[1:] if k and not _tag(end, part) else part
                            for k, part in enumerate(text.split(end)))
        return text


def _tag(end, part):
    """Whether this goes on a sentence after speech ("Why?" asked Tom) and so keeps its small letter."""
    return end in ('!" ', '?" ') and part.split(" ", 1)[0] in ("said", "asked", "called", "answered")


def corpus(seed, count):
    """`count` different stories; the same seed gives the same ones."""
    teller, seen, stories = Teller(seed), set(), []
    while len(stories) < count:
        story = teller.story()
        if story not in seen:
            seen.add(story)
            stories.append(story)
    return stories


if __name__ == "__main__":
    for text in corpus(1, 8):
        print(text, end="\n\n---\n\n")
