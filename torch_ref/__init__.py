"""GPT-2 in PyTorch: the reference, and the programs that train it and convert weights."""

from data.ranks import quieten_pytorch

quieten_pytorch()  # here, because its modules import PyTorch first of all
