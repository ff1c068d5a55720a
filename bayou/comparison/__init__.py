"""`bayou compare`: methods times sizes on the user's own models and text.

compare one row after another, resumable      rows.compare
errors by layer and kind                      errors.measure
the rate-distortion bound                     bound.Bound
plot, HTML report                             drawing.draw, page.write
"""
