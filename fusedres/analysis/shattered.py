def shattered(): ...
def shattered_by_depth(): ...


class Shattered:
    name = "shattered"
    title = ""
