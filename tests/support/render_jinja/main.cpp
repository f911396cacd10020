// Renders chat templates by llama.cpp's own engine, with the variables that llama-server sets: as JSON lines
// {"template", "bos_token", "eos_token", "time", "thinking", "conversations"} in, {"prompts"} out; a prompt is null where
// the template refuses. One translation unit of llama.cpp's files, which are compiled from its source package.
#include "json.cpp"
#include "unicode.cpp"
#undef FILENAME
#include "jinja/string.cpp"
#undef FILENAME
#include "jinja/lexer.cpp"
#undef FILENAME
#include "jinja/parser.cpp"
#undef FILENAME
#include "jinja/value.cpp"
#undef FILENAME
#include "jinja/runtime.cpp"
#undef FILENAME
#include "jinja/caps.cpp"

#include <ctime>
#include <iostream>

static std::string today(const jinja::context & context, const char * format) {
    char text[64];
    std::strftime(text, sizeof text, format, std::localtime(&context.current_time));
    return text;
}

// As common_chat_template_direct_apply_impl and common_chat_extra_context (chat.cpp) hand them over.
static common_json variables(const common_json & request, const common_json & messages, const jinja::context & context) {
    return common_json{
        {"messages", messages},
        {"bos_token", request.at("bos_token")},
        {"eos_token", request.at("eos_token")},
        {"enable_thinking", request.at("thinking")},
        {"datetime", today(context, "%b %d %Y")},
        {"date_string", today(context, "%d %b %Y")},
        {"preserve_reasoning", true},
        {"add_generation_prompt", true},
    };
}

static common_json prompts(const common_json & request) {
    const std::string source = request.at("template");
    jinja::lexer lexer;
    auto program = jinja::parse_from_tokens(lexer.tokenize(source));
    auto texts = common_json::array();
    for (const auto & messages : request.at("conversations")) {
        try {
            jinja::context context(source);
            context.current_time = request.at("time").get<int64_t>();
            jinja::caps_apply_preserve_reasoning(context, true);
            jinja::global_from_json(context, variables(request, messages, context), true);
            jinja::runtime runtime(context);
            auto parts = jinja::runtime::gather_string_parts(runtime.execute(program));
            texts.push_back(parts->as_string().str());
        } catch (const std::exception &) {
            texts.push_back(nullptr);
        }
    }
    return texts;
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        common_json answer = common_json::object();
        try {
            answer["prompts"] = prompts(common_json::parse(line));
        } catch (const std::exception & error) {
            answer["error"] = std::string(error.what());
        }
        std::cout << answer.dump_safe() << std::endl;
    }
}
