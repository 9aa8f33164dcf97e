"""What a decoder is made of. Each class pulls its own tensors, of this rank's share, when it is constructed.

Legend of shapes: t tokens, n heads, h head dim, d model, w MLP width, r rows, v vocabulary.
"""
