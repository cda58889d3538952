"""Draws the README's picture: 64 prompts, the styles taking turns, seeds in order: `make picture`."""

from pathlib import Path

from smalti.evaluation.sheet import sheet
from smalti.sampling.pictures import draw_pictures
from smalti.zoo.loader import load_model

PROMPTS = """
red heart; blue heart; a green heart; purple heart; yellow heart; broken heart; black heart; a pink heart
grinning face; crying face; angry face; smiling face with sunglasses; sleeping face
face with tongue; kissing face; sick green face
three o'clock; six o'clock; nine o'clock; twelve o'clock; alarm clock; hourglass; stopwatch; a clock
green apple; red apple; banana; lemon; watermelon; strawberry; grapes; pineapple
slice of pizza; hamburger; french fries; doughnut; birthday cake; ice cream; bread; cup of coffee
cat face; dog face; fox; panda; lion; pig face; frog; rabbit face
penguin; fish; whale; octopus; butterfly; ladybug; turtle; bird
sun; cloud; cloud with rain; rainbow; snowflake; lightning; full moon; star
""".replace("\n", ";")

if __name__ == "__main__":
    prompts = [prompt.strip() for prompt in PROMPTS.split(";") if prompt.strip()]
    pipe = load_model("emoji")
    names = pipe.config["styles"]
    styles = [names[(index + index // 8) % len(names)] for index in range(len(prompts))]
    pictures = draw_pictures(pipe, prompts, styles, range(len(prompts)))
    file = Path(__file__).with_name("emoji.png")
    sheet(pictures, prompts, columns=8).quantize(256).save(file, optimize=True)
    print(file)
