"""`--distill`: training what a file stores in floats while its codes stay as they are, taught by the fine-tune.

    what is asked for, and what is refused    asked.py
    text of the fine-tune's own               samples.py
    the numbers that are trained              values.py, student.py
    the training                              training.py
    BitDelta's own recipe, gains only         gains.py

The file's size does not change: a scale is trained in fp32 and stored as the fp16 that it was.
"""

from bayou.distillation.asked import Asked, Distilled, ask, words

__all__ = ["Asked", "Distilled", "ask", "words"]
