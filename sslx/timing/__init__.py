"""How fast a training step is, and where its time goes.

``clock`` times the real loop, ``compilation`` its compiler, ``product`` the machine, ``trace`` names operations,
``result`` is what comes out, ``report`` prints it and sets one beside another.
"""
