"""One label for each cluster and one cluster for each label: the assignment that gets most points right.

The Hungarian method (Kuhn 1955) as shortest augmenting paths over potentials (Jonker & Volgenant 1987), O(n³).
"""

from __future__ import annotations

from collections.abc import Sequence


def one_to_one(votes: Sequence[Sequence[float]]) -> list[int]:
    """The column of every row of a square table, each taken once, so that the sum of the entries is largest."""
    n = len(votes)
    # Costs are negative votes. Column n is where a row waits that has none; potentials keep reduced costs from 0 up.
    of_row, of_column = [0.0] * n, [0.0] * (n + 1)
    owner = [-1] * (n + 1)
    for row in range(n):
        owner[n] = row
        slack, before, visited = [float("inf")] * n, [n] * n, [False] * (n + 1)
        column = n
        while owner[column] >= 0:
            visited[column] = True
            at = owner[column]
            for other in range(n):
                reduced = -votes[at][other] - of_row[at] - of_column[other]
                if not visited[other] and reduced < slack[other]:
                    slack[other], before[other] = reduced, column
            step, following = min((slack[other], other) for other in range(n) if not visited[other])
            for other in range(n + 1):
                if visited[other]:
                    of_row[owner[other]] += step
                    of_column[other] -= step
                elif other < n:
                    slack[other] -= step
            column = following
        while column != n:  # along the path, every row moves on to the column that it reached
            owner[column] = owner[before[column]]
            column = before[column]
    columns = [0] * n
    for column in range(n):
        columns[owner[column]] = column
    return columns
