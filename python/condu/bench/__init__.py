"""The kernels against a copy of the same bytes and against pure PyTorch: ``condu bench``.

One run builds models of real shapes with random weights, checks every result before it is timed,
and leaves a JSON record, a Markdown table and a picture. It needs the core dependencies alone.
"""
