"""The image server behind `dite serve`: an HTTP process that holds no model, and ranks that may die under it.

    client ── app ── service ── supervisor ══ pipes ══ rank ── engine ── the pipeline
              HTTP    queue      processes              (torch from here on)

Nothing on this side of the pipes imports torch.
"""
