"""What the demo is trained on, where torch is installed."""

from demo.canvas_tasks import canvas_held_out
from demo.pool import Example, canvas_example, collate
from demo.tokenizer import build


def test_noise_stays_inside_the_span():
    tokenizer, instance = build(), canvas_held_out("infill", 1)[0]
    example = canvas_example(tokenizer, instance)
    hole = len(tokenizer.encode(instance.parts[0].text).ids)
    assert example.span.tolist() == [True] * hole + [False] * (64 - hole)
    _, _, canvas, span, old = collate([example, Example(example.prefix, example.canvas)])
    assert span[1].all() and (old == canvas).all()


def test_an_edit_remembers_what_stood_there():
    tokenizer = build()
    for instance in canvas_held_out("edit", 20):
        example = canvas_example(tokenizer, instance)
        before, after = (tokenizer.encode(text).ids for text in (instance.parts[0].old, instance.parts[0].text))
        assert (example.old[: len(after)].tolist() == before) or len(before) != len(after)
