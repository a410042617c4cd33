"""Several processes of one launch: one of them controls, and has ranks started on every node.

Launchers tell each process its rank (`autotune.standing`); all that the processes tell each other
afterwards goes through files (`autotune.nodes.session`).
"""
