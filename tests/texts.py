"""Texts and token ids that tokenizers often get wrong."""

TEXTS = {
    "empty": "",
    "english": "Describe this image.",
    "contractions": "It's we'll THEY'RE I'M don't 'tis o'clock ''s 'S",
    "digits": "1234567890 3.14159 ٣٤٥ ४५६ ½ ² Ⅷ 12,345 007",
    "spaces": " a  b   c\td\t\te   ",
    "newlines": "\n\n a\r\nb\r\r\n \n\n  \n x \n",
    "odd whitespace": "a\u00a0b\u2003c\u3000d\u200be\u2028f\u2029g\ufeffh\x0bi\x0cj\x85k",
    "punctuation": "Wait... what?! (yes) [no] {x} <y> -- “quoted” «x» … ‽ #1 @me $5 100%\n\n",
    "code": "def f(x):\n    return {'a': x**2}  # comment\n\n\tif x != 0: pass\n",
    "url": "https://example.org/a_b-c?d=e&f=%20#g",
    "chinese": "你好，世界！这张图片里有什么？",
    "japanese": "これは何の画像ですか？カタカナと漢字。",
    "korean": "이 그림을 설명해 주세요.",
    "jamo that NFC joins": "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "arabic": "صِف هذه الصورة من فضلك؟",
    "hebrew": "תאר את התמונה הזאת",
    "hindi": "इस चित्र का वर्णन कीजिए।",
    "thai": "อธิบายภาพนี้",
    "tamil": "இந்த படத்தை விவரிக்கவும்",
    "cyrillic and greek": "Опишите картинку. Περιγράψτε την εικόνα.",
    "georgian and armenian": "აღწერე სურათი Նկարագրիր նկարը",
    "amharic": "ይህን ምስል ግለጽ",
    "latin with marks": "façade naïve Übergröße ångström Łódź ﬁne İstanbul",
    "marks apart, which NFC joins": "cafe\u0301 A\u030angstro\u0308m n\u0303 \u1e9b\u0323",
    "marks that NFC orders": "q\u0307\u0323 a\u0301\u0315\u0300",
    "signs that NFC replaces": "\u212b \u2126 \u0340 \u2f00 \uf900 \u0958",
    "marks without a letter": "\u0301\u0301 \u0e49\u0e49 ͏",
    "zalgo": "h̷̡̛e̸͖͝l̶̰̽l̵̪̈́o̸",
    "emoji": "😀👍🏽👩‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️‍🔥 1️⃣",
    "far planes": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀𓀀 𠀀𪚥 \U0010ffff",
    "controls": "\x00\x01\x1b[31m\x7f\x80\x9f\u202eabc\u202c",
    "replacement character": "\ufffd a\ufffdb",
    "chat tokens": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "all control tokens": "<|endoftext|><|object_ref_start|>x<|object_ref_end|>"
    "<|box_start|>(1,2)<|box_end|>"
    "<|quad_start|><|quad_end|><|vision_start|><|image_pad|><|video_pad|><|vision_pad|><|vision_end|>",
    "control tokens with blanks": " <|im_end|>  <|im_end|>\n<|image_pad|> x<|image_pad|>y",
    "not quite control tokens": "<|im_start <|im_end| |> <|image_pads|> <|IM_END|> "
    "< |im_end|> <|extra_0|>",
    "long run": "a" * 300 + " " * 130 + "!" * 70 + "好" * 40,
}

# Token id sequences that are not the encoding of any text. The first 256 ids are single bytes: 172
# is 0xF0, 253 is 0x9F, 246 is 0x98, 222 is 0x80, and 9284 is 0xF0 0x9F; F0 9F 98 80 is 😀. 74785 is
# "Describe", 419 is " this".
IDS = {
    "a character in four tokens": [172, 253, 246, 222],
    "half a character": [9284],
    "half a character, then a word": [9284, 419],
    "three quarters, then the whole": [9284, 246, 9284, 246, 222],
    "a control token inside a character": [9284, 151645, 246, 222],
    "single bytes": list(range(256)),
    "single bytes backwards": list(range(255, -1, -1)),
    "rows of the embedding without a token": [74785, 151657, 151935, 419, 152063],
    "only control tokens": [151643, 151644, 151645, 151655],
}
