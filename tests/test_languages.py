"""Matching, BM25 and mining in seven languages whose words DPR's and bm25s' rules cut wrongly or not at all."""

# ruff: noqa: E501 (its widths count a Chinese character twice)

import pytest

from tests.processes import main
from tests.toy import write_lines
from utils.data import Corpus, read_questions, read_run
from utils.plumbing.config import UserError
from utils.text import answer_position, has_answer, words

# a language: ten passages, by twos of one city; the first of the two answers the question about its country
PASSAGES = {
    "Chinese": """北京是中国的首都。 / 故宫位于北京市中心,每年有许多游客。 / 东京是日本的首都。 / 晴空塔是东京最高的建筑。
        / 巴黎是法国的首都。 / 塞纳河流经巴黎。 / 开罗是埃及的首都。 / 尼罗河穿过开罗。 / 罗马是意大利的首都。 / 斗兽场在罗马城里。""",
    "Japanese": """東京は日本の首都です。 / スカイツリーは東京で一番高い建物です。 / パリはフランスの首都です。 / セーヌ川はパリを流れます。
        / カイロはエジプトの首都です。 / ナイル川はカイロを通ります。 / ローマはイタリアの首都です。 / コロッセオはローマにあります。
        / 北京は中国の首都です。 / 故宮は北京の中心にあります。""",
    "Thai": """กรุงเทพเป็นเมืองหลวงของไทย / วัดพระแก้วอยู่ในกรุงเทพใกล้แม่น้ำ / ปารีสเป็นเมืองหลวงของฝรั่งเศส / แม่น้ำแซนไหลผ่านปารีส
        / โตเกียวเป็นเมืองหลวงของญี่ปุ่น / หอคอยสูงที่สุดอยู่ในโตเกียว / ไคโรเป็นเมืองหลวงของอียิปต์ / แม่น้ำไนล์ไหลผ่านไคโร
        / โรมเป็นเมืองหลวงของอิตาลี / สนามกีฬาโบราณอยู่ในโรม""",
    "Korean": """서울은 대한민국의 수도이다. / 한강은 서울을 가로질러 흐른다. / 파리는 프랑스의 수도이다. / 센강은 파리를 지나간다.
        / 도쿄는 일본의 수도이다. / 스카이트리는 도쿄에 있다. / 카이로는 이집트의 수도이다. / 나일강은 카이로를 지난다.
        / 로마는 이탈리아의 수도이다. / 콜로세움은 로마에 있다.""",
    "Hindi": """दिल्ली भारत की राजधानी है। / लाल किला दिल्ली में है। / पेरिस फ़्रांस की राजधानी है। / सीन नदी पेरिस से बहती है।
        / टोक्यो जापान की राजधानी है। / सबसे ऊँची मीनार टोक्यो में है। / काहिरा मिस्र की राजधानी है। / नील नदी काहिरा से बहती है।
        / रोम इटली की राजधानी है। / कोलोसियम रोम में है।""",
    "Telugu": """ఢిల్లీ భారతదేశ రాజధాని. / ఎర్రకోట ఢిల్లీ నగరంలో ఉంది. / పారిస్ ఫ్రాన్స్ రాజధాని. / సీన్ నది పారిస్ గుండా ప్రవహిస్తుంది.
        / టోక్యో జపాన్ రాజధాని. / ఎత్తైన గోపురం టోక్యో నగరంలో ఉంది. / కైరో ఈజిప్ట్ రాజధాని. / నైలు నది కైరో గుండా ప్రవహిస్తుంది.
        / రోమ్ ఇటలీ రాజధాని. / కొలోసియం రోమ్ నగరంలో ఉంది.""",
    "Arabic": """القاهرة هي عاصمة مصر. / يمر نهر النيل عبر القاهرة. / باريس هي عاصمة فرنسا. / يمر نهر السين عبر باريس.
        / طوكيو هي عاصمة اليابان. / أعلى برج يقع في طوكيو. / روما هي عاصمة إيطاليا. / يقع الكولوسيوم في روما.
        / دلهي هي عاصمة الهند. / تقع القلعة الحمراء في دلهي.""",
}  # fmt: skip
ASKED = {  # the question about a country, the countries and their cities
    "Chinese": ("{}的首都是哪里", "中国 日本 法国 埃及 意大利", "北京 东京 巴黎 开罗 罗马"),
    "Japanese": ("{}の首都はどこですか", "日本 フランス エジプト イタリア 中国", "東京 パリ カイロ ローマ 北京"),
    "Thai": ("เมืองหลวงของ{}คือเมืองอะไร", "ไทย ฝรั่งเศส ญี่ปุ่น อียิปต์ อิตาลี", "กรุงเทพ ปารีส โตเกียว ไคโร โรม"),
    "Korean": ("{}의 수도는 어디인가", "대한민국 프랑스 일본 이집트 이탈리아", "서울 파리 도쿄 카이로 로마"),
    "Hindi": ("{} की राजधानी क्या है", "भारत फ़्रांस जापान मिस्र इटली", "दिल्ली पेरिस टोक्यो काहिरा रोम"),
    "Telugu": ("{} రాజధాని ఏది", "భారతదేశ ఫ్రాన్స్ జపాన్ ఈజిప్ట్ ఇటలీ", "ఢిల్లీ పారిస్ టోక్యో కైరో రోమ్"),
    "Arabic": ("ما هي عاصمة {}", "مصر فرنسا اليابان إيطاليا الهند", "القاهرة باريس طوكيو روما دلهي"),
}  # fmt: skip


@pytest.fixture
def world(tmp_path, request):
    """A corpus of ten passages and five questions in one language."""
    passages = [" ".join(text.split()) for text in PASSAGES[request.param].split("/")]
    assert len(passages) == 10
    rows = [f"{number}\t{text}\t\n" for number, text in enumerate(passages)]
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(rows), encoding="utf-8")
    form, countries, cities = ASKED[request.param]
    rows = []
    for number, (country, city) in enumerate(zip(countries.split(), cities.split(), strict=True)):
        row = {"qid": f"q{number}", "question": form.format(country), "answers": [city]}
        rows.append(row | {"positives": [str(2 * number)]})
    write_lines(tmp_path / "questions.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("world", PASSAGES, indirect=True)
def test_matching_bm25_and_mining(world, capsys):
    """A plain loop says which passages hold the answer; BM25 ranks gold first; none of them is a negative."""
    corpus = Corpus(world / "corpus.tsv")
    questions = read_questions(world / "questions.jsonl")
    for question in questions:
        (answer,) = question["answers"]
        for passage in corpus:
            inside = answer in passage.text
            assert has_answer(passage.text, [answer]) == inside, (answer, passage.text)
            position = answer_position(passage.text, [answer])
            assert (passage.text[slice(*position)] if position else "") == (answer if inside else "")

    keys = {"corpus": world / "corpus.tsv", "questions": world / "questions.jsonl"}
    main("utils.bm25", keys | {"out": world / "bm25.run", "k": 10})
    ranking = read_run(world / "bm25.run")
    assert [ranking[f"q{n}"][0][0] for n in range(5)] == [str(2 * n) for n in range(5)]
    assert "top-1                     100.0" in capsys.readouterr().out

    # every other passage is a negative candidate; the city's own two are none
    everything = "".join(f"q{n}\t{pid}\t{pid + 1}\t{-pid}\n" for n in range(5) for pid in range(10))
    (world / "all.run").write_text(everything)
    main("mine_negatives.py", keys | {"run": world / "all.run", "out": world / "train.jsonl", "depth": 30})
    for number, row in enumerate(read_questions(world / "train.jsonl")):
        assert {int(pid) for pid in row["negatives"]} == set(range(10)) - {2 * number, 2 * number + 1}


@pytest.mark.parametrize(
    ("passage", "answer", "expected"),
    [
        ("我的iPhone手机", "iPhone", True),
        ("我的iPhone手机", "iPhone 手机", True),
        ("2008年8月", "8月", True),
        ("2008年8月", "08年", False),
        ("삼성Galaxy는", "Galaxy", False),
        ("KBS방송국이", "방송국", True),
        ("서울올림픽은", "서울 올림픽", True),
        ("เมืองหลวง", "มือง", False),
        ("บ้านนา", "บ้านน", False),
        ("コンピュータ", "コンピ", False),
        ("コンピュータを", "コンピュータ", True),
        ("Samsung은 크다", "Samsung", True),
        ("남서울", "서울", False),
        ("각각", "가가", False),
        ("각나라", "각나", True),
        ("가각", "가가", False),
        ("がいこく", "かい", False),
        ("ธนาคารกิจ", "ธนาคารก", False),
        ("किताब", "क", False),
        ("किताब", "कि", False),
        ("北京", "北", False),
        ("ＡＢＣ大学", "ＡＢＣ", True),
        ("Beyoncé是", "Beyonce", False),
    ],
)
def test_where_a_word_may_end(passage, answer, expected):
    """Between scripts and inside runs without spaces; not inside a syllable, a number or a Korean word's head."""
    assert has_answer(passage, [answer]) == expected


def test_the_words_of_bm25():
    assert words("Ada's C++ or C# is not (R), 北京大学 a東 서울은 किताब café x_1") == [
        "ada", "c++", "or", "c#", "is", "not", "北京", "京大", "大学", "東", "서울", "울은", "किताब", "café", "x_1",
    ]  # fmt: skip
    assert words("cafe\u0301") == words("café")


def test_mining_stops_where_answers_match_no_positive(tmp_path):
    """Answers in another language: every right passage would become a hard negative."""
    corpus = tmp_path / "corpus.tsv"
    corpus.write_text("id\ttext\ttitle\n" + "".join(f"{n}\tOslo lies in Norway {n}.\t\n" for n in range(6)))
    rows = [{"qid": f"q{n}", "question": "?", "answers": ["奥斯陆"], "positives": [str(n)]} for n in range(4)]
    write_lines(tmp_path / "q.jsonl", rows)
    (tmp_path / "x.run").write_text("".join(f"q{n}\t5\t1\t1.0\n" for n in range(4)))
    keys = {"corpus": corpus, "questions": tmp_path / "q.jsonl", "run": tmp_path / "x.run"}
    with pytest.raises(UserError, match="4 of 4 questions have no answer in a positive"):
        main("mine_negatives.py", keys | {"out": tmp_path / "train.jsonl"})
    assert not (tmp_path / "train.jsonl").exists()
