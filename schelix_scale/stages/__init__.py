"""The stages of a run, in order: genes, features, graph, train, embed. Each fills its part of the run directory.

A stage reads only what the ones before it published, so that any of them can be done again alone.
"""

from schelix_scale.stages.features import write_stream_features
from schelix_scale.stages.genes import find_genes
from schelix_scale.stages.graph import build_graph
from schelix_scale.stages.model import embed_cells, train_model

STAGES = (find_genes, write_stream_features, build_graph, train_model, embed_cells)

__all__ = ["STAGES"]
